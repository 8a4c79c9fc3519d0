"""The benchmark's models by name: their sizes, their FLOPs, what they need, and what they refuse."""

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from duet import DuetConfig, attach, bench, bench_shapes
from duet.bench_device import energy_meter, preprocessing_seconds

CPU = torch.device("cpu")
QWEN = bench.SHAPES["qwen-quick"]
PREFILL = bench.Case("prefill", 1, 40, 0)


@pytest.mark.parametrize(
    ("name", "millions"), [("7B", 7063), ("13B", 13351), ("Qwen2.5-VL-7B", 8292), ("mid", 574), ("tiny", 4)]
)
def test_shapes_have_the_published_sizes(name, millions):
    every, trained = bench_shapes.parameters(bench.SHAPES[name])
    assert every / 1e6 == pytest.approx(millions, rel=0.01, abs=0.7)
    assert 0 < trained < every


@pytest.mark.parametrize("tokens", [None, 100])
def test_predicted_flops_of_a_qwen_match_a_counter(tokens):
    model = QWEN.build(CPU, torch.float32, "eager")
    config = DuetConfig.none()
    if tokens is not None:
        config = DuetConfig(dominant=60, contextual=7, schedule={4: 0.5, 6: 0.0})
    inputs = PREFILL.inputs(model, QWEN, CPU)
    with attach(model, config), FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(**inputs, use_cache=True, logits_to_keep=1)
    predicted, counted = sum(bench.predicted_flops(QWEN, PREFILL, config).values()), counter.get_total_flops()
    assert 0.995 * predicted < counted, (counted, predicted)
    assert counted < predicted * (1.01 if tokens is None else 1.25)


def test_flops_of_qwens_language_model_by_hand():
    """One layer with grouped keys: 2 * (n d (2 d + 2 kv) + n (n + 1) d + 3 n d m)."""
    shape = bench.SHAPES["Qwen2.5-VL-7B"].with_tokens(1000)
    n, d, kv, m = 1040, 3584, 512, 18944
    by_hand = 28 * 2 * (n * d * (2 * d + 2 * kv) + n * (n + 1) * d + 3 * n * d * m)
    predicted = bench.predicted_flops(shape, PREFILL, None, causal=True)
    assert predicted["decoder"] == by_hand
    assert predicted["head"] == 2 * d * 152064


@pytest.mark.parametrize(("name", "tokens"), [("quick", 144), ("qwen-quick", 144), ("qwen-long", 64)])
def test_a_picture_has_as_many_tokens_as_asked(name, tokens):
    shape = bench.SHAPES[name].with_tokens(tokens)
    model = shape.build(CPU, torch.float32, "sdpa")
    inputs = bench.Case("train", 2, 12, 4).inputs(model, shape, CPU)
    assert inputs["input_ids"].shape == (2, 12 + tokens)
    assert (inputs["labels"] != -100).sum(1).tolist() == [4, 4]
    with torch.inference_mode():
        assert model(**inputs).logits.shape[1] == 12 + tokens
    assert bench_shapes.parameters(shape)[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [("mid", 4000, "must be a square, for example 3969 or 4096"), ("qwen-long", 4099, "makes no picture")],
)
def test_tokens_that_make_no_picture(name, tokens, message):
    with pytest.raises(ValueError, match=message):
        bench.SHAPES[name].with_tokens(tokens)


def test_a_shape_that_does_not_fit_says_what_it_needs():
    shape = bench.SHAPES["13B"]
    needed = bench_shapes.bytes_needed(shape, [bench.Case("prefill", 1, 64, 0)], torch.float32)
    assert 48 * bench_shapes.GIB < needed < 70 * bench_shapes.GIB
    training = bench_shapes.bytes_needed(shape, [bench.Case("train", 1, 64, 32)], torch.float32)
    assert training > 3.5 * needed
    with pytest.raises(ValueError, match=r"shape 13B needs about \d+\.\d GiB here, and cpu has 24\.0 GiB free"):
        bench_shapes.check_memory(shape, needed, 24 * bench_shapes.GIB, CPU)
    bench_shapes.check_memory(shape, needed, None, CPU)  # where nothing tells, it is tried
    long, prefill = bench.SHAPES["qwen-long"].with_tokens(16384), [bench.Case("prefill", 1, 64, 0)]
    maps = bench_shapes.bytes_needed(long, prefill, torch.float32, eager=True)
    assert maps - bench_shapes.bytes_needed(long, prefill, torch.float32) >= 2 * 16384**2 * 4


def test_nothing_is_allocated_before_the_check(monkeypatch, capsys):
    monkeypatch.setattr(bench, "memory_free", lambda device: 2**20)
    monkeypatch.setattr(bench, "calibrate", lambda *_: pytest.fail("measured before the check"))
    assert bench.main(["--quick"]) == 1
    assert "error: shape quick needs about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nonsense"], "unknown method 'nonsense'"),
        (["--text", "1"], "--text 2 or more"),
        (["--batch", "0"], "--batch and --train_batch must be 1 or more"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--stage1_tokens", "100"], "must be 576 or more"),
        (["--visual_tokens", "577"], "must be a square"),
        (["--budgets", "191"], "has rows"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert bench.main(["--quick", *arguments]) == 1
    assert message in capsys.readouterr().err


def entries(*arguments):
    args = bench.make_parser().parse_args(list(arguments))
    return bench.pick_entries(args, bench.pick_shape(args))


def test_all_methods_at_a_budget():
    found, left_out = entries("--methods", "all", "--budgets", "192")
    names = [entry.name for entry in found]
    assert names[:3] == ["transformers", "full", "duet-192"]
    assert {"fastv-192", "visionzip-192", "pyramiddrop-192", "dart-192"} <= set(names)
    assert any(reason.startswith("prumerge_adaptive-192: ") for reason in left_out)
    assert len(names) == len(set(names))


def test_budgets_follow_the_number_of_tokens():
    found, _ = entries("--shape", "qwen-long", "--visual_tokens", "4096", "--budgets", "192", "--eager")
    assert [entry.name for entry in found] == ["transformers", "full", "duet-1365", "duet-1365 eager"]
    assert found[2].config.average_tokens(4096, 8) == pytest.approx(4096 / 3, abs=0.5)
    assert found[3].eager
    assert found[3].config == found[2].config


def test_cases_are_all_batches_with_all_texts():
    args = argparse.Namespace(
        text=[32, 256], batch=[1, 4], train_batch=[2], rounds=1, decode=0, stage1_tokens=[], quick=False
    )
    assert [(case.kind, case.batch, case.text) for case in bench.pick_cases(args)] == [
        ("prefill", 1, 32), ("prefill", 1, 256), ("prefill", 4, 32), ("prefill", 4, 256), ("train", 2, 32),
        ("train", 2, 256),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["mid", "Qwen2.5-VL-7B"])
def test_a_photo_is_prepared(name):
    seconds = preprocessing_seconds(bench.SHAPES[name], times=1)
    assert seconds is None or 0 < seconds < 10


def test_a_cpu_counts_no_energy():
    assert energy_meter(CPU) is None
