"""`python -m llava.eval.compare`: methods by budgets, seeds together, refusals named, finished runs reused."""

import csv

import pytest
import runner_world
from runner_world import flags

from llava.eval.compare import main, make_plans
from llava.eval.tasks.pope import Pope
from llava.eval.tasks.scienceqa import ScienceQa


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for task in (Pope, ScienceQa):
            patch.setattr(task, "max_new_tokens", 4)
        yield runner_world.build_world(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def compared(world):
    out = world.folder / "out"
    return out, command(world, out), main(command(world, out))


def command(world, out):
    more = ("--methods", "duet,fastv,random", "--budgets", "12,6", "--seeds", "0,1")
    return flags(world, out, *more, benchmarks="pope,scienceqa")


def test_the_table_has_every_method_and_says_what_cannot_be(compared):
    out, _, status = compared
    assert status == 0
    text = (out / "compare.md").read_text()
    first, second = text.split("## 6 visual tokens")
    assert [line.split(" | ")[0].strip("| ") for line in first.splitlines() if " | " in line][1] == "full"
    for line in first.splitlines():
        if line.startswith(("| duet", "| fastv", "| random")):
            assert abs(float(line.split(" | ")[1]) - 12) <= 0.5
    assert "±" in next(line for line in first.splitlines() if line.startswith("| random"))
    assert "±" not in next(line for line in first.splitlines() if line.startswith("| duet"))
    assert "| fastv" not in second and "| duet" in second
    assert "- not run: fastv cannot average 6 of 36 visual tokens over 4 layers; the nearest is 9" in text


def test_the_csv_has_a_line_per_seed(compared):
    with open(compared[0] / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["method"], row["budget"], row["seed_number"]) for row in rows]
    assert found.count(("random", "12", "0")) == found.count(("random", "12", "1")) == 1
    baseline = rows[0]
    assert baseline["method"] == "full" and float(baseline["avg_percent"]) == pytest.approx(100)
    assert float(baseline["visual_tokens"]) == 36
    for row in rows:
        percent = [
            100 * float(row[name]) / float(baseline[name]) for name in ("pope", "scienceqa") if float(baseline[name])
        ]
        assert float(row["avg_percent"]) == pytest.approx(sum(percent) / len(percent))


def test_finished_runs_are_reused(world, compared, monkeypatch):
    out, again, _ = compared
    before = (out / "compare.md").read_text()
    monkeypatch.setattr(
        "llava.eval.generate.Answerer.generate", lambda *_: pytest.fail("asked although the answer is stored")
    )
    assert main(again) == 0
    assert (out / "compare.md").read_text() == before


def test_a_plot_where_matplotlib_is_there(compared):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[demo]'")
    assert (compared[0] / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_random_methods_alone_have_seeds():
    plans, refused = make_plans(["duet", "random-llm"], [128, 64], [0, 1, 2], 576, 32)
    assert [plan.name for plan in plans[:5]] == [
        "full", "duet-128", "random-llm-128-seed0", "random-llm-128-seed1", "random-llm-128-seed2",
    ]  # fmt: skip
    assert len(plans) == 9 and not refused
    assert [plan.config.seed for plan in plans[2:5]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--methods", "fastw", "unknown fastw; known: all, duet"),
        ("--budgets", "many", "--budgets many: expected whole numbers"),
        ("--seeds", "", "--seeds : expected numbers"),
    ],
)
def test_wrong_requests(world, capsys, flag, value, message):
    assert main([*flags(world, world.folder / "none"), flag, value]) == 1
    assert message in capsys.readouterr().err
