"""The table: the paper's arithmetic, what is left out, what is said about it."""

import csv
import json

import pytest

from llava.eval import report
from llava.eval.paper import PAPER_ROWS
from llava.eval.tasks.base import BadEvalData

FIVE = ("pope", "scienceqa", "textvqa", "mme", "gqa")
VIDEOS = ("tgif_qa", "msvd_qa", "msrvtt_qa")


def result(name, benchmark, score, **changes):
    metric = "judge_accuracy" if benchmark in VIDEOS else "accuracy"
    base = {
        "name": name,
        "benchmark": benchmark,
        "title": benchmark.upper(),
        "headline": metric,
        "metrics": {metric: score},
        "n_expected": 10,
        "n_missing": 0,
        "n_unparsed": 0,
        "missing_skipped": False,
        "visual_tokens": {"samples": 10, "average_tokens": 576.0, "untouched": {}, "cut": 0},
        "seconds_per_sample": 0.1,
        "digest": "0" * 12,
        "notes": [],
    }
    return base | changes


def results(name, benchmarks=FIVE):
    return [result(name, benchmark, PAPER_ROWS[name][benchmark]) for benchmark in benchmarks]


def averages(records, baseline):
    return {row.name: row.average for row in report.make_rows(records, baseline)}


def test_the_average_is_the_papers():
    names = [f"paper-7b-duet-{tokens}{kind}" for kind in ("", "-trained") for tokens in (192, 128, 64)]
    found = averages([record for name in names for record in results(name)], "paper-7b")
    expected = [98.996, 98.107, 95.372, 99.711, 99.111, 97.188]
    assert [round(found[name], 3) for name in names] == expected
    assert found["paper-7b"] == 100.0


def test_six_benchmarks_and_videos_average_as_in_the_paper():
    found = averages(results("paper-7b-duet-192", (*FIVE, "seed_image")), "paper-7b")
    assert round(found["paper-7b-duet-192"], 2) == 98.91
    names = ("paper-video-7b-duet-960", "paper-video-7b-duet-136")
    found = averages([record for name in names for record in results(name, VIDEOS)], "paper-video-7b")
    assert [round(found[name], 3) for name in names] == [100.770, 97.549]


def test_the_average_is_over_what_both_rows_have():
    records = [result("full", "pope", 80), result("full", "gqa", 50), result("x", "pope", 40), result("x", "mme", 900)]
    full, other = report.make_rows(records, "full")
    assert (other.percent, other.average, other.compared) == ({"pope": 50.0}, 50.0, 1)
    assert (full.average, full.compared) == (100.0, 2)
    assert report.make_rows(records, None)[0].average is None


def test_a_baseline_of_zero_gives_no_percentage():
    records = [result("full", "pope", 0), result("full", "gqa", 50), result("x", "pope", 40), result("x", "gqa", 25)]
    assert report.make_rows(records, "full")[1].percent == {"gqa": 50.0}


def test_tokens_and_stages_are_summed_over_benchmarks():
    def tokens(samples, average, untouched):
        return {"samples": samples, "average_tokens": average, "untouched": untouched, "cut": 0}

    records = [
        result("x", "pope", 1, visual_tokens=tokens(30, 100.0, {"stage 1": 3}), seconds_per_sample=0.1),
        result("x", "gqa", 1, visual_tokens=tokens(10, 200.0, {"stage 1": 1}), seconds_per_sample=0.3),
        result("x", "mme", 1, visual_tokens=tokens(0, None, {}), seconds_per_sample=None),
    ]
    (row,) = report.make_rows(records, None)
    assert row.tokens == 125.0 and row.seconds == pytest.approx(0.2)
    assert row.untouched == {"stage 1": (4, 40)}


def test_a_row_without_all_answers_has_no_score_unless_that_was_meant():
    records = [
        result("x", "pope", 80, n_missing=2),
        result("x", "gqa", 60, n_missing=1, missing_skipped=True),
        result("x", "mme", 1862, n_unparsed=3, notes=["a note"]),
    ]
    rows = report.make_rows(records, None)
    assert rows[0].scores == {"gqa": 60, "mme": 1862}
    text = report.markdown(rows, None)
    assert "incomplete" in text and "2 of 10 questions have no answer; no score" in text
    assert "1 of 10 questions have no answer and count as wrong" in text
    assert "3 answers could not be read" in text and "a note" in text


def write(folder, records):
    for number, record in enumerate(records):
        (folder / record["name"]).mkdir(parents=True, exist_ok=True)
        (folder / record["name"] / f"{record['benchmark']}-{number}.result.json").write_text(json.dumps(record))


def test_the_three_files_say_the_same(tmp_path, capsys):
    write(tmp_path, [*results("paper-7b-duet-192"), result("paper-7b-duet-192", "own", 12.5)])
    assert report.main([str(tmp_path), "--baseline", "paper-7b"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == text
    head, _, baseline, row = text.splitlines()[:4]
    assert [cell.strip() for cell in head.split("|")[3:9]] == ["POPE", "SQA", "TextVQA", "MME", "GQA", "OWN"]
    assert "| paper-7b | n/a | 85.9 (100.0%)" in baseline and "n/a" in baseline
    assert "86.5 (100.7%)" in row and "1817 (97.6%)" in row and "| 12.5 |" in row and "99.0% of 5" in row
    with open(tmp_path / "report.csv", newline="") as file:
        table = {line["run"]: line for line in csv.DictReader(file)}
    assert float(table["paper-7b-duet-192"]["pope_percent"]) == pytest.approx(100.69849)
    assert table["paper-7b-duet-192"]["own_percent"] == "" and table["paper-7b"]["own"] == ""
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["rows"][1]["average"] == pytest.approx(float(table["paper-7b-duet-192"]["avg_percent"]))
    assert len(content["results"]) == 6


def test_the_papers_rows_can_be_shown_and_benchmarks_chosen(tmp_path, capsys):
    write(tmp_path, [result("mine", "pope", 80), result("mine", "gqa", 50)])
    assert report.main([str(tmp_path), "--baseline", "mine", "--paper", "--benchmarks", "pope"]) == 0
    out = capsys.readouterr().out
    assert "GQA" not in out and "paper-video" not in out
    assert "| paper-7b-duet-64 | n/a | 82.5 (96.0%) | 96.0% of 1 |" in out
    assert "| mine | 576.00 | 80.0 (100.0%) |" in out


def test_a_note_is_printed_once_with_the_rows_that_it_holds_for():
    records = [result(name, "pope", 80, notes=["of all"]) for name in ("a", "b", "c")]
    records[0]["notes"] = ["of all", "of a", "3 answers say neither"]
    records[0]["n_unparsed"] = 3
    text = report.markdown(report.make_rows(records, None), None)
    assert text.splitlines()[-3:] == ["- POPE: of all", "- POPE (a): of a", "- POPE (a): 3 answers say neither"]


def test_the_exit_status_tells_of_missing_answers(tmp_path, capsys):
    write(tmp_path, [result("mine", "pope", 80, n_missing=1)])
    assert report.main([str(tmp_path)]) == 2
    assert "incomplete: mine, pope: 1 missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        ([], [], "has no *.result.json; run python -m llava.eval"),
        ([result("a", "pope", 1), result("a", "pope", 2)], [], "row 'a' has two results for pope"),
        ([result("a", "pope", 1)], ["--baseline", "b"], "no baseline 'b'; known: a, paper-7b"),
        ([{"name": "a", "benchmark": "pope"}], [], "metrics"),
        ([result("a", "pope", 1)], ["--benchmarks", "nope"], "unknown benchmark 'nope'"),
    ],
)
def test_wrong_folders_and_names_are_refused(tmp_path, capsys, records, arguments, message):
    write(tmp_path, records)
    assert report.main([str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_bad_results_are_bad_data(tmp_path):
    (tmp_path / "x.result.json").write_text("[1]")
    with pytest.raises(BadEvalData, match=r"x\.result\.json"):
        report.read_records(tmp_path)


def test_what_a_sample_costs_is_averaged_over_samples_with_a_picture(tmp_path):
    def cost(samples, scale):
        entering = {
            "samples": samples,
            "average_tokens": 10.0 * scale,
            "entering_tokens": 30.0 * scale,
            "untouched": {},
        }
        return entering | {"retained_tokens": 5.0 * scale, "prefill_flops": 2e9 * scale, "kv_bytes": 2**20 * scale}

    records = [
        result("x", "pope", 1, visual_tokens=cost(30, 1) | {"tower_flops": 1e9}),
        result("x", "gqa", 1, visual_tokens=cost(10, 2) | {"tower_flops": None}),
        result("x", "mme", 1, visual_tokens={"samples": 5, "average_tokens": None, "untouched": {}}),
    ]
    rows = report.make_rows(records, None)
    text = report.write_report(records, rows, None, tmp_path / "report")
    head, _, line = (part.split(" | ") for part in text.splitlines()[:3])
    cells = dict(zip(head, line, strict=True))
    assert [cells[name] for name in report.COST_HEADS] == ["37.5", "6.2", "2.50", "1.00", "1.25"]
    with open(tmp_path / "report.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["prefill_flops"]) == 2.5e9 and float(row["kv_bytes"]) == 1.25 * 2**20
    assert (float(row["entering_tokens"]), float(row["retained_tokens"])) == (37.5, 6.25)
