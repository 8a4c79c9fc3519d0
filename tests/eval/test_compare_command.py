"""`duet compare`: methods by budgets, seeds and models together, refusals named, finished runs reused."""

import csv
import json
import shutil

import pytest
import runner_world
from runner_world import flags

from llava.eval.compare import main
from llava.eval.plans import Geometry, baseline, choose_methods, read_geometry, run_name, solved_plans


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runner_world.short_answers(tmp_path_factory.mktemp("compare"), 4) as world:
        yield world


@pytest.fixture(scope="module")
def compared(world):
    out = world.folder / "out"
    return out, command(world, out), main(command(world, out))


def command(world, out, *more):
    chosen = ("--methods", "duet,fastv,random,visionzip+fastv", "--budgets", "12,6", "--seeds", "0,1")
    return flags(world, out, *chosen, *more, benchmarks="pope,scienceqa")


def table(text):
    """Cells of every line of a Markdown table by its first cell."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 3:
            found[cells[0]] = cells
    return found


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_every_method_and_says_what_cannot_be(compared):
    out, _, status = compared
    assert status == 0
    text = (out / "compare.md").read_text()
    blocks = text.split("\n## ")
    assert [block.splitlines()[0] for block in blocks[1:]] == ["Avg 12 tokens (↓ 66.7%)", "Avg 6 tokens (↓ 83.3%)"]
    first, second = table(blocks[1]), table(blocks[2])
    head = first["method"]
    assert list(first)[2] == "full (36 tokens)" and head[:5] == ["method", "POPE", "SQA", "Avg", "visual tokens"]
    for name in ("duet", "fastv", "random", "visionzip+fastv"):
        assert abs(float(first[name][4]) - 12) <= 0.5
        assert first[name][1].count("%") == 1 and float(first[name][head.index("prefill GFLOPs")]) > 0
    assert "±" in first["random"][1] and "±" not in first["duet"][1]
    assert "fastv" not in second and "duet" in second
    assert "- not run: fastv cannot average 6 of 36 visual tokens over 4 layers; the nearest is 9" in text
    assert "--methods duet,fastv,random,visionzip+fastv --budgets 12,6" in text.splitlines()[2]


def test_the_csv_has_a_line_per_run(compared):
    rows = csv_rows(compared[0] / "compare.csv")
    found = [(row["method"], row["budget"], row["seed"]) for row in rows]
    assert found.count(("random", "12", "0")) == found.count(("random", "12", "1")) == 1
    baseline_row = rows[0]
    assert baseline_row["method"] == "full" and float(baseline_row["avg_percent"]) == pytest.approx(100)
    assert float(baseline_row["tokens"]) == float(baseline_row["retained"]) == 36
    for row in rows:
        names = [name for name in ("pope", "scienceqa") if float(baseline_row[name])]
        percent = [100 * float(row[name]) / float(baseline_row[name]) for name in names]
        assert float(row["avg_percent"]) == pytest.approx(sum(percent) / len(percent))
        assert [float(row[f"{name}_percent"]) for name in names] == pytest.approx(percent)
    stored = json.loads((compared[0] / "compare.json").read_text())
    assert len(stored["runs"]) == len(rows) and len(stored["not_run"]) == 1
    assert stored["runs"][1]["reduction"]["stage1"] == "local_cluster" and stored["runs"][0]["reduction"] is None


def test_the_record_of_a_run_holds_its_cost(compared):
    records = [json.loads(path.read_text()) for path in compared[0].rglob("*.result.json")]
    assert len(records) == 2 * 10  # full, fastv; duet and the pair at two budgets; random twice at each
    assert all(record["visual_tokens"]["prefill_flops"] > 0 for record in records)
    for benchmark in ("pope", "scienceqa"):
        own = [record for record in records if record["benchmark"] == benchmark]
        (full,) = [record for record in own if record["settings"]["reduction"] is None]
        assert full["visual_tokens"]["prefill_flops"] == max(r["visual_tokens"]["prefill_flops"] for r in own)


def test_a_cost_does_not_depend_on_the_batch(world, compared, tmp_path):
    alone = ("--methods", "duet,visionzip+fastv", "--budgets", "12", "--batch", "1")
    assert main(flags(world, tmp_path, *alone, benchmarks="pope,scienceqa")) == 0
    batched = {(row["method"], row["budget"]): row for row in csv_rows(compared[0] / "compare.csv")}
    for row in csv_rows(tmp_path / "compare.csv"):
        for name in ("tokens", "entering", "retained", "prefill_flops", "tower_flops", "kv_bytes"):
            assert float(row[name]) == pytest.approx(float(batched[row["method"], row["budget"]][name])), name


def forbid_asking(monkeypatch):
    message = "asked although the answer is stored"
    monkeypatch.setattr("llava.eval.generate.Answerer.generate", lambda *_: pytest.fail(message))


def test_finished_runs_are_reused(compared, monkeypatch):
    out, again, _ = compared
    before = (out / "compare.md").read_text()
    forbid_asking(monkeypatch)
    assert main(again) == 0
    assert (out / "compare.md").read_text() == before


def test_another_comparison_takes_the_runs_that_are_there(world, compared, tmp_path, monkeypatch):
    forbid_asking(monkeypatch)
    shutil.copytree(compared[0], tmp_path / "copy")
    fewer = ("--methods", "duet,random", "--budgets", "12", "--seeds", "1")
    assert main(flags(world, tmp_path / "copy", *fewer, benchmarks="pope,scienceqa")) == 0
    rows = csv_rows(tmp_path / "copy" / "compare.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [("full", ""), ("duet", ""), ("random", "1")]


def test_an_interruption_leaves_a_table_of_what_is_there(world, monkeypatch):
    from llava.eval import __main__ as single

    out, asked = world.folder / "torn", []
    records = single.Session.records

    def interrupted(session, options):
        asked.append(options.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return records(session, options)

    with monkeypatch.context() as patch:
        patch.setattr(single.Session, "records", interrupted)
        assert main(command(world, out)) == 130
    assert len(csv_rows(out / "compare.csv")) == 2
    assert main(command(world, out)) == 0
    assert len(csv_rows(out / "compare.csv")) == 10


def test_a_plot_where_matplotlib_is_there(compared):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[demo]'")
    assert (compared[0] / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_several_models_are_put_together(world, tmp_path):
    twin = tmp_path / "other" / "tiny-llava"
    shutil.copytree(world.model, twin)
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"seed_of_training": 2}))
    base = flags(world, tmp_path / "out", "--methods", "duet", "--budgets", "12")
    base[base.index("--model-path") + 1] = f"{world.model},{twin}"
    assert main(base) == 0
    rows = csv_rows(tmp_path / "out" / "compare.csv")
    assert len(rows) == 4 and len({row["model"] for row in rows}) == 2
    line = table((tmp_path / "out" / "compare.md").read_text())["duet"]
    assert "± 0.0" in line[1]


def test_models_of_different_sizes_are_refused(world, tmp_path, capsys):
    other = tmp_path / "deeper"
    shutil.copytree(world.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    base = flags(world, tmp_path / "out", "--methods", "duet", "--budgets", "12")
    base[base.index("--model-path") + 1] = f"{world.model},{other}"
    assert main(base) == 1
    assert "must name models of one size" in capsys.readouterr().err


def test_methods_that_take_no_budget_have_a_block_of_their_own(world, tmp_path):
    some = ("--methods", "duet,prumerge_adaptive", "--budgets", "12", "--limit-pictures", 2, "--latency", 2)
    assert main(flags(world, tmp_path, *some)) == 0
    text = (tmp_path / "compare.md").read_text()
    assert "prumerge_adaptive" in table(text.split("## Other settings")[1])
    assert "as released, at the average that their settings have: prumerge_adaptive" in text
    rows = csv_rows(tmp_path / "compare.csv")
    assert [row["method"] for row in rows] == ["full", "prumerge_adaptive", "duet"]
    assert all(0 < float(row["latency"]) < 5 for row in rows) and "n/a" not in table(text)["duet"]


def test_a_part_of_a_benchmark_is_scored_and_labelled(world, tmp_path):
    some = ("--methods", "duet", "--budgets", "12", "--limit-pictures", 2)
    assert main(flags(world, tmp_path, *some)) == 0
    text = (tmp_path / "compare.md").read_text()
    assert "POPE, 2 pictures" in text and "POPE, 2 pictures (12 questions)" in text
    assert csv_rows(tmp_path / "compare.csv")[1]["pope_2_pictures"]


def test_geometry_is_read_without_weights(world, monkeypatch):
    monkeypatch.setattr("llava.model.loading.load_pretrained", lambda *_, **__: pytest.fail("loaded weights"))
    geometry = read_geometry(str(world.model), None)
    assert (geometry.patches, geometry.layers, geometry.reduction) == (36, 4, None)


def test_random_methods_alone_have_seeds():
    plans, refused = solved_plans(["duet", "random-llm", "random+none"], [128, 64], [0, 1, 2], Geometry(576, 32))
    found = [(plan.label, plan.budget, plan.seed) for plan in plans]
    assert found[:3] == [("full", 0, None), ("duet", 128, None), ("random-llm", 128, 0)]
    assert len(plans) == 1 + 2 * 7 and not refused
    assert [plan.config.seed for plan in plans[2:5]] == [0, 1, 2]
    assert len({plan.name for plan in plans}) == len(plans)
    assert plans[2].line == plans[3].line != plans[1].line


def test_a_runs_name_is_readable_and_decided_by_the_configuration():
    plans, _ = solved_plans(["duet", "fastv"], [128], [0], Geometry(576, 32))
    assert baseline().name == "full"
    assert plans[1].name.startswith("local_cluster-") and "-text_guided-16x0.5-24x0-" in plans[1].name
    assert plans[2].name.startswith("fastv-2x0.171-")
    assert run_name(plans[1].config) == plans[1].name != run_name(plans[2].config)


def test_all_takes_every_method_and_names_what_cannot_run(monkeypatch):
    from duet.methods import METHODS, Method

    broken = Method("none", {99: 0.5}, "ratios", "nobody", {"queries": "sideways"})
    monkeypatch.setitem(METHODS, "broken", broken)
    methods, tolerant = choose_methods("all")
    assert methods == list(METHODS) and tolerant
    plans, refused = solved_plans(methods, [128], [0], Geometry(576, 32), tolerant)
    assert any(reason.startswith("broken at 128:") for reason in refused)
    assert {plan.label for plan in plans} >= {"full", "duet", "fastv"}
    with pytest.raises(ValueError):
        solved_plans(["broken"], [128], [0], Geometry(576, 32))


def test_a_missing_calibration_says_which_command_makes_it():
    arguments = (["fitprune"], [192, 128], [0], Geometry(576, 32))
    with pytest.raises(ValueError, match="fitprune needs a calibration of the model"):
        solved_plans(*arguments)
    plans, refused = solved_plans(*arguments, tolerant=True)
    assert len(plans) == len(refused) == 1
    with pytest.raises(ValueError, match="nowhere"):
        solved_plans(*arguments, calibration="nowhere.json")


def test_a_calibration_next_to_the_model_is_found(tmp_path):
    from llava.eval.compare import find_calibration, make_parser

    args = make_parser().parse_args(["--model-path", f"{tmp_path},other", "--benchmarks", "pope"])
    assert find_calibration(args) is None
    (tmp_path / "fitprune.json").write_text("{}")
    assert find_calibration(args) == str(tmp_path / "fitprune.json")
    args.calibration = "given.json"
    assert find_calibration(args) == "given.json"


def test_settings_as_released_stand_apart():
    plans, _ = solved_plans(["fastv", "dart-release"], [192], [0], Geometry(576, 32))
    assert [plan.exact for plan in plans] == [True, True, False]
    assert abs(plans[2].config.average_tokens(576, 32) - 192) > 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "fastw"), "unknown fastw; known: all, duet"),
        (("--methods", "visionzip+divprune"), "divprune is a vision reducer, and a pair has one of each"),
        (("--methods", ","), "unknown empty list"),
        (("--budgets", "many"), "--budgets many: expected whole numbers"),
        (("--budgets", "0"), "--budgets 0: expected numbers of at least 1"),
        (("--budgets", "600"), "--budgets 600: a picture has 36 visual tokens"),
        (("--latency", "-1"), "--latency -1 must be at least 0"),
        (("--seeds", ""), "--seeds : expected numbers"),
        (("--limit-pictures", "0"), "--limit-pictures 0 must be at least 1"),
        (("--model-path", "/nowhere/at/all"), "does not exist"),
    ],
)
def test_wrong_requests_stop_before_weights_are_loaded(world, capsys, monkeypatch, more, message):
    monkeypatch.setattr("llava.eval.__main__.load_pretrained_model", lambda *_, **__: pytest.fail("loaded weights"))
    assert main([*flags(world, world.folder / "none", "--budgets", "12"), *more]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--dominant", 40), "40 + 7 = 47, but the vision tower gives 36 tokens"),
        (("--reduce", "visionzip+divprune"), "divprune is a vision reducer"),
        (("--reduce", "visionzip+none", "--layer_list", "[1]", "--image_token_ratio_list", "[0.5]"), "has no effect"),
        (("--dominant", 9, "--layer_list", "[7]", "--image_token_ratio_list", "[0.5]"), "beyond the model"),
    ],
)
def test_a_single_evaluation_stops_as_early(world, capsys, monkeypatch, more, message):
    from llava.eval.__main__ import main as evaluate

    monkeypatch.setattr("llava.eval.__main__.load_pretrained_model", lambda *_, **__: pytest.fail("loaded weights"))
    assert evaluate(flags(world, world.folder / "none", *more)) == 1
    assert message in capsys.readouterr().err


def test_several_processes_share_the_runs(world, compared, tmp_path):
    some = ("--methods", "duet,random", "--budgets", "12", "--seeds", "0,1")
    command_line = flags(world, tmp_path, *some, benchmarks="pope,scienceqa")
    assert runner_world.in_processes(main, command_line, world=2) == [0, 0]
    alone = {(row["method"], row["budget"], row["seed"]): row for row in csv_rows(compared[0] / "compare.csv")}
    rows = csv_rows(tmp_path / "compare.csv")
    assert [row["method"] for row in rows] == ["full", "duet", "random", "random"]
    for row in rows:
        before = alone[row["method"], row["budget"], row["seed"]]
        assert all(row[name] == before[name] for name in ("pope", "scienceqa", "avg_percent", "prefill_flops"))
