"""What the benchmark writes: shares of what is possible, goals against eager maps, growth of stage 1, a run's files."""

import csv
import json

import pytest
import torch

from duet import bench, bench_goals, bench_plot, bench_report
from duet.bench_memory import largest_batch
from duet.bench_roofline import Machine, Work, calibrate, decode_layer, decoder_layer, flops, product
from duet.bench_run import FULL, cache_bytes
from duet.bench_stage1 import FEW_READERS, PASSES, SEQUENCE, Point, exponent, growth, run_stage1
from duet.budget import DecoderShape

CPU = torch.device("cpu")


def test_work_takes_the_longer_of_arithmetic_and_memory():
    machine = Machine(flops=100.0, bandwidth=8.0)
    assert machine.seconds([Work(1000, 1)], 2) == 10
    assert machine.seconds([Work(10, 40)], 2) == 10
    assert machine.seconds([Work(1000, 1), Work(10, 40)], 2) == 20
    assert product(2, 3, 5) == Work(60, 6 + 15 + 10)


def test_one_token_costs_what_it_adds():
    """The n-th token does the arithmetic that a prefill of n does beyond one of n - 1, and reads all weights."""
    shape = DecoderShape(layers=1, width=64, mlp_width=172, heads=4, kv_heads=2, head_dim=16, vocabulary=99)
    added = flops(decoder_layer(shape, 3, 41)) - flops(decoder_layer(shape, 3, 40))
    assert flops(decode_layer(shape, 3, 40)) == added
    weights = 64 * (64 + 64) + 64 * 64 + 3 * 64 * 172
    assert sum(work.elements for work in decode_layer(shape, 3, 40)) > weights + 3 * 40 * 2 * 32


def test_the_machine_is_measured():
    machine = calibrate(CPU, torch.float32, quick=True)
    assert 1e8 < machine.flops < 1e14
    assert 1e8 < machine.bandwidth < 1e13


def row(name, seconds, peak, tokens=576, **more):
    run = dict.fromkeys(bench.SECTIONS, 0.0) | {"backward": 0.0, "optimizer": 0.0, "decoder": seconds, "total": seconds}
    done = {"vision": 1.0, "decoder": seconds, "head": 0.0}
    return bench.Row(name, tokens, 1.0, done, done, [run], bench.PeakMemory(peak, None), **more)


def report(rows, text=(40,)):
    results = [(bench.Case("prefill", 1, length, 0), rows) for length in text]
    return bench_report.markdown(results, {}, bench.SECTIONS, bench.LANGUAGE, FULL)


def test_goals_against_eager_maps():
    rows = [row("full", 2.0, 100), row("duet-1", 1.0, 10), row("duet-1 eager", 1.05, 60)]
    assert "- MISSED: prefill batch 1, duet-1 eager: 1.05 times its time without maps (goal 1.1 at least)" in report(
        rows
    )
    long = [row("full", 2.0, 100, 4096), row("duet-1", 1.0, 10), row("duet-1 eager", 2.5, 60)]
    text = report(long)
    assert "- met: prefill batch 1, duet-1 eager: 2.50 times its time without maps (goal 2 at least)" in text
    assert "- MISSED: prefill batch 1, duet-1 eager: without maps 16.7% of its extra memory (goal 15% at most)" in text
    assert "language part" not in text, "widths of long shapes are too small for that"


def test_goals_name_the_text_length_where_there_are_several():
    rows = [row("full", 2.0, 100), row("duet-1", 2.5, 100)]
    text = report(rows, (32, 256))
    for length in (32, 256):
        assert f"- MISSED: prefill batch 1 text {length}, duet-1: 0.80 times as fast as full tokens" in text
        assert f"## Prefill, batch 1, {length} text tokens" in text


def test_shares_of_what_is_possible():
    rows = [row("full", 2.0, 100, possible={"tower": 0.0, "decoder": 1.5}), row("duet-1", 1.0, 100, possible={})]
    assert bench_report.possible_share(rows[0], "decoder") == 0.75
    assert bench_report.possible_share(rows[0], "tower") is None
    assert bench_report.possible_share(rows[1], "decoder") is None
    assert "| full | - | 1500.0 (75%) | 1500 (75%) |" in report(rows)


def test_kv_caches_are_judged():
    rows = [
        row("full", 2.0, 100, kv_bytes=200, kv_predicted=200),
        row("duet-1", 1.0, 100, kv_bytes=50, kv_predicted=50),
        row("duet-2", 1.0, 100, kv_bytes=60, kv_predicted=50),
    ]
    text = report(rows)
    assert "- met: prefill batch 1, duet-1: KV cache 100.0% of what the budget says" in text
    assert "- MISSED: prefill batch 1, duet-2: KV cache 120.0% of what the budget says" in text
    assert "| duet-1 | 0.0 | 0.250 | 0.250 |" in text


def test_growth_is_a_power_of_the_tokens():
    sizes = [576, 1152, 4608]
    assert exponent(sizes, sizes) == pytest.approx(1)
    assert exponent(sizes, [n**2 for n in sizes]) == pytest.approx(2)
    points = [Point(PASSES, n, n, [n / 1e6]) for n in sizes] + [Point(SEQUENCE, n, 7 * n, [n**2 / 1e9]) for n in sizes]
    assert growth(points)[SEQUENCE] == (pytest.approx(2), pytest.approx(1))
    lines = bench_goals.judge_growth(points)
    assert [line.split(":")[0] for line in lines] == ["- met", "- met", "- MISSED", "- met"]
    assert growth(points[:1]) == {}


def test_stage_1_alone_needs_memory_in_proportion_to_the_tokens():
    shape = bench.SHAPES["qwen-quick"]
    points = run_stage1(shape, [1152, 4608], 1, CPU, torch.float32, lambda line: None)
    assert [(point.series, point.tokens) for point in points] == [
        (series, tokens) for series in (SEQUENCE, FEW_READERS, PASSES) for tokens in (1152, 4608)
    ]
    assert all(point.median > 0 for point in points)
    for small, large in (points[:2], points[2:4], points[4:]):
        assert small.memory < large.memory < 6 * small.memory, "a map would grow 16 times"


RUN = [
    "--quick", "--shape", "qwen-long", "--visual_tokens", "144", "--rounds", "1", "--budgets", "192", "--batch", "2",
    "--text", "12", "--train_batch", "1", "--methods", "local_cluster", "--eager", "--threads", "1",
    "--stage1_tokens", "576", "1152", "--equal_memory",
]  # fmt: skip


def test_a_run_of_everything_writes_its_reports(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"all.{kind}" for kind in ("markdown", "csv", "json")} | {"plot": tmp_path / "all.png"}
    threads = torch.get_num_threads()
    try:
        assert bench.main(RUN + [part for kind, path in files.items() for part in (f"--{kind}", str(path))]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    names = ["transformers", "full", "duet-48", "local_cluster-48", "duet-48 eager", "local_cluster-48 eager"]
    with files["csv"].open() as handle:
        lines = list(csv.DictReader(handle))
    assert [(line["kind"], line["text"], line["configuration"]) for line in lines] == [
        (kind, "12", name) for kind in ("prefill", "train") for name in names
    ]
    for line in lines:
        parts = sum(float(line[s]) for s in (*bench.SECTIONS, "backward", "optimizer"))
        assert parts == pytest.approx(float(line["total"]), rel=0.05)
        assert float(line["possible_decoder"]) > 0
        if line["kind"] == "prefill":
            assert line["kv_bytes"] == line["kv_predicted"]
            assert float(line["decode"]) > 0
            assert float(line["stage1"]) < float(line["total"])
    stored = json.loads(files["json"].read_text())
    duet = stored["cases"][0]["rows"][2]
    assert [name for name in duet["seconds"][0] if name.startswith("segment")] == ["segment1", "segment2", "segment3"]
    assert sum(duet["seconds"][0][f"segment{n}"] for n in (1, 2, 3)) == pytest.approx(duet["seconds"][0]["decoder"])
    assert [point["tokens"] for point in stored["stage1"]] == [576, 1152] * 3
    (fitted,) = stored["equal_memory"]
    assert [fit["name"] for fit in fitted["fits"]] == ["full", "duet-48", "local_cluster-48"]
    room = fitted["fits"][0]["memory"]
    assert all(fit["memory"] <= room and len(fit["seconds"]) == 1 for fit in fitted["fits"])
    assert fitted["fits"][1]["batch"] > fitted["fits"][0]["batch"] == 1
    assert {"device", "commit", "torch", "best matrix product", "best copy"} <= set(stored["environment"])
    for heading in ("possible", "decoder, segment by segment", "decode", "eager maps / configuration", "series"):
        assert f"| {heading} |" in printed
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "all_stage1.csv").read_text().count("\n") == 7


@pytest.mark.parametrize(("fixed", "each", "wanted"), [(100, 10, 7), (100, 45, 2), (171, 1, 2), (0, 21, 8)])
def test_a_batch_grows_as_far_as_the_memory_goes(fixed, each, wanted):
    assert largest_batch(lambda batch: fixed + each * batch, 2, 170) == (wanted, fixed + each * wanted)


def test_a_batch_is_lowered_where_the_prediction_was_too_high():
    peaks = {2: 20, 4: 30, 8: 200, 5: 101}
    assert largest_batch(peaks.__getitem__, 2, 99) == (4, 30)


def test_stage_1_can_run_alone(tmp_path):
    path = tmp_path / "only.csv"
    arguments = ["--quick", "--rounds", "1", "--batch", "--train_batch", "--stage1_tokens", "576", "--csv", str(path)]
    assert bench.main(arguments) == 0
    assert not path.exists()
    assert (tmp_path / "only_stage1.csv").exists()


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        bench_plot.check_plotting()


def test_cache_bytes_count_keys_and_values():
    model = bench.SHAPES["quick"].with_tokens(4).build(CPU, torch.float32, "sdpa")
    inputs = bench.Case("prefill", 1, 6, 0).inputs(model, bench.SHAPES["quick"].with_tokens(4), CPU)
    with torch.inference_mode():
        held = model(**inputs, use_cache=True).past_key_values
    assert cache_bytes(held) == 8 * 2 * 10 * 64 * 4
