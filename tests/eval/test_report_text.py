"""Names that others wrote break no table, hold no markup and start no formula."""

import csv
import json

import pytest

from duet.cells import csv_cell, markdown_cell, one_line
from llava.eval import report
from llava.eval.lines import Line, Result
from llava.eval.plans import Plan
from llava.eval.report import Row
from llava.eval.tables import markdown, write_csv
from playground.tiny.report import markdown as tiny_markdown

EVIL = "=cmd|'/c calc'!A1 | <script>alert(1)</script>\n# owned [x](http://a) `b` \u2028 \x1b[31m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("duet-192", "duet-192"),
        ("two_words", "two_words"),
        ("a|b", r"a\|b"),
        ("a\r\nb\tc", "a b c"),
        ("<b> & </b>", "&lt;b&gt; &amp; &lt;/b&gt;"),
        ("[x](y)", r"\[x\](y)"),
        ("`x` *y*", r"\`x\` \*y\*"),
        ("a\\|b", r"a\\\|b"),
        (192, "192"),
    ],
)
def test_a_cell_of_markdown_shows_the_text(text, shown):
    assert markdown_cell(text) == shown


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r+", " ="])
def test_a_cell_of_csv_starts_no_formula(start):
    assert csv_cell(start + "A1").startswith("'")
    assert [csv_cell(value) for value in (-1.5, 3, None, "a-b", "")] == [-1.5, 3, None, "a-b", ""]


def test_one_line_is_one():
    assert one_line("a\u2028b\x85c\x00d\ud800e") == "a b c d e"


def record(**changes):
    ledger = {"samples": 1, "untouched": {"<i>": 1}, "average_tokens": 3.0}
    base = {
        "name": "n", "benchmark": "pope", "title": "P", "headline": "f1", "metrics": {"f1": 50.0}, "n_expected": 2,
        "n_missing": 0, "n_unparsed": 0, "missing_skipped": False, "visual_tokens": ledger, "seconds_per_sample": 0.1,
        "digest": "d", "notes": [],
    }  # fmt: skip
    return base | changes


def check_tables(page, path, rows):
    assert "<" not in page.replace("<br>", "") and "\n# owned" not in page and "\x1b" not in page
    widths = {line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every row has all its cells"
    if path is not None:
        with open(path, newline="", encoding="utf-8") as file:
            cells = list(csv.reader(file))
        assert len(cells) == rows + 1 and not any(cell[:1] in ("=", "+", "@") for row in cells for cell in row)


def test_the_report_of_odd_names(tmp_path, capsys):
    odd = [record(name=EVIL, benchmark=EVIL, title=EVIL, notes=[EVIL], n_missing=1), record(name="plain")]
    for number, one in enumerate(odd):
        (tmp_path / f"{number}.result.json").write_text(json.dumps(one))
    assert report.main([str(tmp_path), "--baseline", EVIL]) == 2
    said = capsys.readouterr()
    check_tables((tmp_path / "report.md").read_text(), tmp_path / "report.csv", 2)
    assert len(said.err.splitlines()) == 1, "one line for the incomplete result"
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["name"] == EVIL, "data stays as it is"


def test_a_comparison_of_odd_names(tmp_path):
    row = Row(EVIL, {"pope": 1.0}, marks={"pope": [EVIL]})
    lines = [Line(Plan("full", 0.0, None), [Result(Plan("full", 0.0, None), EVIL, row)])]
    text = markdown(lines, ["pope"], 36, [EVIL], "# Heading")
    assert "<script" not in text and "\n# owned" not in text
    assert "BROKEN" not in text
    row.marks["pope"].append("BROKEN, no result: all answers are empty")
    text = markdown(lines, ["pope"], 36, [], "# Heading")
    assert "pope: BROKEN, no result: all answers are empty" in text
    write_csv(tmp_path / "a.csv", lines, ["pope"])
    check_tables("| a |", tmp_path / "a.csv", 1)


def test_the_tiny_worlds_table_of_odd_names():
    run = {
        "name": EVIL, "seed": 0, "mean": 0.5, "accuracy": {}, "average_tokens": 1.0, "seconds_per_question": 0.1,
        "peak_memory_mib": 1.0,
    }  # fmt: skip
    check_tables(tiny_markdown([run]), None, 1)
    assert "BROKEN" in tiny_markdown([run | {"broken": ["all answers are empty"]}])
