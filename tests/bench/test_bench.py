"""The benchmark tool: its predictions against an independent FLOP count, its report, and its refusals."""

import csv
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from duet import DuetConfig, attach, bench, bench_report

SMALL = bench.SHAPES["quick"]


@pytest.fixture(scope="module")
def small_model():
    return SMALL.build(torch.device("cpu"), torch.float32, "sdpa")


@pytest.mark.parametrize("tokens", [None, 192, 64])
def test_predicted_flops_match_a_counter(small_model, tokens):
    """On the eager path every matrix product is visible to PyTorch's own counter; the ranking is what is not billed."""
    config = DuetConfig.none() if tokens is None else DuetConfig.preset("llava-1.5-7b", tokens=tokens)
    case = bench.Case("prefill", 1, 40, 0)
    inputs = case.inputs(small_model, SMALL, torch.device("cpu"))
    small_model.set_attn_implementation("eager")
    try:
        with attach(small_model, config), FlopCounterMode(display=False) as counter, torch.inference_mode():
            small_model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        small_model.set_attn_implementation("sdpa")
    predicted = sum(bench.predicted_flops(SMALL, case, config).values())
    counted = counter.get_total_flops()
    assert 0.995 * predicted < counted, (counted, predicted)
    assert counted < predicted * (1.001 if tokens is None else 1.25), "more than predicted, beyond what ranking costs"


def test_predictions_of_the_mid_size_model():
    """By hand for one layer: 2 * (4 n d^2 + 2 n^2 d + 3 n d m)."""
    case, mid = bench.Case("prefill", 1, 40, 0), bench.SHAPES["mid"]
    n, d, m = 616, 1024, 2752
    by_hand = 16 * 2 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)
    assert bench.predicted_flops(mid, case, None)["decoder"] == by_hand
    upper_triangle = 16 * 2 * n * (n - 1) * d
    assert bench.predicted_flops(mid, case, None, causal=True)["decoder"] == by_hand - upper_triangle
    reduced = bench.predicted_flops(mid, case, DuetConfig.preset("llava-1.5-7b", tokens=192))
    assert reduced["head"] == 2 * d * 32000
    assert by_hand / reduced["decoder"] == pytest.approx(2.79, abs=0.01)


def test_a_run_writes_its_reports(tmp_path, capsys):
    files = {kind: tmp_path / "new" / f"report.{kind}" for kind in ("markdown", "csv", "json")}
    arguments = ["--quick", "--rounds", "1", "--budgets", "64", "--batch", "1", "--train_batch", "1", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert (
            bench.main([*arguments, *(part for kind, path in files.items() for part in (f"--{kind}", str(path)))]) == 0
        )
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert files["markdown"].read_text() in printed
    assert "duet-64" in printed
    with files["csv"].open() as handle:
        lines = list(csv.DictReader(handle))
    assert [(line["kind"], line["configuration"]) for line in lines] == [
        (kind, name) for kind in ("prefill", "train") for name in ("transformers", "full", "duet-64")
    ]
    for line in lines:
        parts = sum(float(line[s]) for s in (*bench.SECTIONS, "backward", "optimizer"))
        assert parts == pytest.approx(float(line["total"]), rel=0.05)
        assert int(line["peak_bytes"]) > 0
    reduced = {line["kind"]: float(line["memory"]) for line in lines if line["configuration"] == "duet-64"}
    assert reduced["prefill"] <= 1
    assert reduced["train"] < 0.6
    stored = json.loads(files["json"].read_text())
    assert stored["environment"]["torch"] == torch.__version__
    assert len(stored["cases"][0]["rows"][0]["seconds"]) == 1


def test_goals_are_judged():
    def row(name, seconds, flops, peak):
        sections = dict.fromkeys(bench.SECTIONS, 0.0) | {"backward": 0.0, "optimizer": 0.0}
        run = sections | {"decoder": seconds, "stage1": 0.05, "head": 0.5, "total": seconds + 0.55}
        memory = bench.PeakMemory(peak, None)
        done, square = ({"vision": 1.0, "decoder": n, "head": 0.0} for n in (flops, flops**1.5))
        return bench.Row(name, 1, 1.0, done, square, [run], memory)

    case = bench.Case("prefill", 1, 40, 0)
    rows = [row("full", 2.0, 2.0, 100), row("duet-1", 1.0, 1.0, 100), row("duet-2", 1.5, 1.0, 101)]
    text = bench_report.markdown([(case, rows)], {}, bench.SECTIONS, bench.LANGUAGE, "full")
    assert "- met: prefill batch 1, duet-1: decoder 100.0% of predicted (goal 92%)" in text
    assert "- MISSED: prefill batch 1, duet-1: language part 83.3% of predicted (58.9% of square)" in text
    assert "- MISSED: prefill batch 1, duet-2: decoder 66.7% of predicted" in text
    assert "- MISSED: prefill batch 1, duet-2: peak memory 101.0% of full" in text
    assert "- MISSED: prefill batch 1, duet-1: decisions 1.96% of the prefill (goal 1.5% at most)" in text
    assert "- MISSED: prefill batch 1, duet-2: whole prefill" in text
    assert "- met: prefill batch 1, duet-2: 1.24 times as fast as full tokens (goal never slower)" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an accelerator")
def test_cuda_without_a_device_is_a_clear_error(capsys):
    assert bench.main(["--device", "cuda"]) == 1
    assert "sees no CUDA or ROCm device; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("xpu", "cannot measure"), ("nonsense", "unknown device")])
def test_other_devices_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        bench.pick_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_the_benchmark_runs_on_the_accelerator(tmp_path):
    report = tmp_path / "report.json"
    assert (
        bench.main(["--quick", "--rounds", "2", "--device", "cuda", "--dtype", "bfloat16", "--json", str(report)]) == 0
    )
    row = json.loads(report.read_text())["cases"][0]["rows"][-1]
    assert row["memory"]["tracked"] > 0
    assert all(run["decoder"] > 0 for run in row["seconds"])
