"""Threads that run one attached model at once: each gets what it gets alone."""

import contextlib
import threading

import pytest
import small
import torch

import duet
from duet import DuetConfig

CONFIGS = {
    "paper": DuetConfig(dominant=10, contextual=3, cluster_width=3, schedule={2: 0.5, 4: 0.0}),
    "release": DuetConfig(dominant=10, contextual=3, schedule={2: 0.5, 4: 0.0}, variant="release"),
    "question": DuetConfig(stage1="cdpruner", dominant=10, contextual=0, schedule={2: 0.5}, queries="all"),
}
MEETING_PLACES = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "layer_norm1", "fc2", "down_proj", "linear_2")


def requests(count):
    """One sample each, with pictures and lengths of their own."""
    rows = [small.prompt(2 + number % 3, 1, 4 + number % 2, seed=number) for number in range(count)]
    return [
        {"input_ids": torch.tensor([ids]), "pixel_values": small.pixels(1, seed=100 + number)}
        for number, ids in enumerate(rows)
    ]


def in_threads(count, work):
    """Run ``work(number)`` in so many threads; returns results, and raises what one of them raised."""
    results, errors = [None] * count, []

    def run(number):
        try:
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@torch.inference_mode()
def one_pass(model, request):
    with duet.trace() as seen:
        logits = model(**request).logits
    return logits, seen.images[0].source, seen.images[0].kept_after


@pytest.mark.parametrize("name", CONFIGS)
def test_two_passes_that_meet_at_every_module_equal_each_alone(name):
    """Both threads stand still at every projection and norm until the other is there: nothing may be left in a module.

    An implementation that lets one pass run after the other would be as good, so waiting ends after a while.
    """
    model = small.build()
    duet.attach(model, CONFIGS[name])
    shared = requests(1)[0]["input_ids"]  # one prompt: both passes have the same number of steps
    both = [request | {"input_ids": shared} for request in requests(2)]
    alone = [one_pass(model, request) for request in both]
    assert not torch.equal(alone[0][0], alone[1][0])
    barrier, met = threading.Barrier(2), []

    def meet(*_):
        if threading.current_thread() is not threading.main_thread():
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(timeout=5)
                met.append(1)

    for path, module in model.named_modules():
        if path.rpartition(".")[2] in MEETING_PLACES:
            module.register_forward_pre_hook(meet)
    together = in_threads(2, lambda number: one_pass(model, both[number]))
    assert len(met) > 50, "the threads really met"
    for (logits, source, kept), (wanted, *where) in zip(together, alone, strict=True):
        assert torch.equal(logits, wanted) and [source, kept] == where


def test_fifty_generations_in_each_of_twelve_threads_equal_serial_ones(times=50):
    """Every thread has a request of its own, and always gets the answer that it gets alone."""
    model = small.build()
    duet.attach(model, CONFIGS["paper"])
    given = requests(12)

    def answer(number):
        return model.generate(**given[number], max_new_tokens=3, do_sample=False)

    alone = [answer(number) for number in range(12)]
    found = in_threads(12, lambda number: [answer(number) for _ in range(times)])
    wrong = [number for number, answers in enumerate(found) for one in answers if not torch.equal(one, alone[number])]
    assert not wrong, f"{len(wrong)} of {12 * times} generations differ, of requests {sorted(set(wrong))}"


def test_attaching_and_detaching_one_instance_in_a_thread_is_not_felt_by_another_instance():
    model, other = small.build(), small.build()
    duet.attach(model, CONFIGS["paper"])
    request = requests(1)[0]
    with torch.inference_mode():
        wanted, plain = model(**request).logits, other(**request).logits
    stop = threading.Event()

    @torch.inference_mode()
    def work(number):
        if number == 0:
            answers = [model(**request).logits for _ in range(10)]
            stop.set()
            return all(torch.equal(one, wanted) for one in answers)
        while not stop.is_set():
            with duet.attach(other, CONFIGS["release"]):
                other(**request)
        return torch.equal(other(**request).logits, plain)

    assert in_threads(2, work) == [True, True]


def test_threads_that_ask_a_registry_at_once_all_find_its_entries(tmp_path, monkeypatch):
    package = tmp_path / "slow_entries"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("import time\ntime.sleep(0.3)\nfrom waiting_registry import REGISTRY\n"
                                    "REGISTRY.register('one')(1)\n")  # fmt: skip
    (tmp_path / "waiting_registry.py").write_text(
        "from duet.registry import Registry\nREGISTRY = Registry('entry', 'slow_entries')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from waiting_registry import REGISTRY

    assert in_threads(3, lambda number: REGISTRY.get("one")) == [1, 1, 1]
