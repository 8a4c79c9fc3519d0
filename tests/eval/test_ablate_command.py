"""`duet ablate` and `duet`: files, shared runs, heat maps, errors; the console script's target."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import runner_world
import torch
from PIL import Image
from runner_world import flags
from transformers import LlamaModel

import llava.eval.generate
from duet import DuetConfig
from duet.tracing import ImageRecord
from llava import cli
from llava.eval.ablate import main
from llava.eval.heat_maps import patch_scores, salient_maps
from llava.eval.tasks.pope import Pope
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pope, "max_new_tokens", 2)
        yield runner_world.build_world(tmp_path_factory.mktemp("ablate"))


def some(world, out, *more):
    return flags(world, out, "--limit-pictures", 2, *more)


def test_an_ablation_writes_its_files_and_shares_runs(world, tmp_path, monkeypatch, capsys):
    assert main(["fig3", *some(world, tmp_path, "--budgets", "12")]) == 0
    text = (tmp_path / "ablate-fig3.md").read_text()
    assert text.startswith("# Cluster width\n\nFigure 3, TextVQA. `duet ablate fig3 --model-path")
    assert "| method | cluster width | POPE, 2 pictures | Avg |" in text and capsys.readouterr().out.endswith(
        text + "\n"
    )
    with open(tmp_path / "ablate-fig3.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cluster width"] for row in rows] == ["", "1", "2", "3", "4", "5", "6", "8", "12"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[demo]'")
    assert (tmp_path / "ablate-fig3.png").read_bytes().startswith(b"\x89PNG")

    asked = []
    generate = llava.eval.generate.Answerer.generate
    monkeypatch.setattr(
        "llava.eval.generate.Answerer.generate",
        lambda self, *a: asked.append(self.model.reduction) or generate(self, *a),
    )
    assert main(["table8", *some(world, tmp_path, "--budgets", "12")]) == 0
    assert {config.queries for config in asked} == {"all", "salient"}, "(C) and the baseline are there already"
    assert main(["table8", *some(world, tmp_path, "--budgets", "12")]) == 0
    assert "| (C+S) |" in (tmp_path / "ablate-table8.md").read_text()


@pytest.mark.parametrize("name", ["fig5", "table11"])
def test_ablations_without_budgets(world, tmp_path, name):
    assert main([name, *some(world, tmp_path)]) == 0
    text = (tmp_path / f"ablate-{name}.md").read_text()
    assert ("## Other settings" if name == "fig5" else "## Avg 17 tokens") in text
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[demo]'")
    assert (tmp_path / f"ablate-{name}.png").exists()


@pytest.mark.parametrize(("given", "message"), [([], "no ablation"), (["fig9"], "unknown ablation 'fig9'")])
def test_an_unknown_ablation_lists_the_known_ones(capsys, given, message):
    assert main(given) == 1
    said = capsys.readouterr().err
    assert message in said and all(name in said for name in ("table7", "fig3", "fig78", "fig4", "fig6"))


def test_heat_maps_are_the_dense_attention(world):
    path = str(world.model)
    reduction = DuetConfig(dominant=10, contextual=3, cluster_width=3, schedule={3: 0.5}, queries="salient")
    tokenizer, model, _, _ = load_pretrained_model(
        path, None, get_model_name_from_path(path), device="cpu", duet_config=reduction
    )
    ids = [1, 5, 9, -200, *range(20, 30)]
    pixels = torch.randn(3, 84, 84, generator=torch.Generator().manual_seed(0))
    maps, record = salient_maps(model, ids, pixels, 2)
    assert len(maps) == 6 and maps[-1].position == 9 and len(tokenizer) > 30

    dense = LlamaModel.from_pretrained(world.folder / "llm", attn_implementation="eager")
    batch = model.prepare_inputs_labels_for_multimodal(torch.tensor([ids]), None, None, None, None, pixels[None])
    with torch.no_grad():
        attention = dense(inputs_embeds=batch[4], output_attentions=True).attentions[1][0].mean(0)
    for one in maps:
        row = attention[3 + 13 + one.position, 3:16]
        assert torch.allclose(one.scores, patch_scores(record, range(13), row), atol=1e-5)
        assert int((one.scores > 0).sum()) >= 10

    later, record = salient_maps(model, ids, pixels, 4)
    kept = record.kept_after[3]
    assert len(kept) == 6 and all(0 < int((one.scores > 0).sum()) <= 6 * 3 for one in later)
    model.set_reduction(DuetConfig(dominant=10, contextual=3, schedule={3: 0.0}))
    with pytest.raises(ValueError, match="no visual token is left at layer 4; ask for one up to 3"):
        salient_maps(model, ids, pixels, 4)
    with pytest.raises(ValueError, match="no text after the picture"):
        salient_maps(model, [1, 5, -200], pixels, 2)


def test_scores_are_spread_over_the_patches_of_a_token():
    record = ImageRecord((2, 3), [-1, 0, 4, 2], ["class", "dominant", "dominant", "contextual"], [[2, 3, 4]])
    out = patch_scores(record, [0, 1, 2, 3], torch.tensor([0.9, 0.1, 0.3, 0.2]))
    assert out.tolist() == pytest.approx([0.1, 0, 0.2, 0.2, 0.3, 0])
    assert patch_scores(record, [3], torch.tensor([0.5])).tolist() == [0, 0, 0.5, 0.5, 0.5, 0]


def heat(world, tmp_path, *more):
    picture = tmp_path / "picture.png"
    if not picture.exists():
        runner_world.save_picture(picture, 3)
    fixed = (
        "--model-path",
        world.model,
        "--device",
        "cpu",
        "--question",
        "Is there a cat?",
        "--out",
        tmp_path / "h.png",
    )
    return [str(part) for part in (*fixed, "--image", picture, *more)]


@pytest.mark.parametrize("name", ["fig4", "fig6"])
def test_a_heat_map_is_drawn_for_every_salient_token(world, tmp_path, capsys, name):
    assert main([name, *heat(world, tmp_path)]) == 0
    words = capsys.readouterr().out.split(": ", 1)[1].split(", ")
    assert len(words) == 6
    with Image.open(tmp_path / "h.png") as drawn:
        assert drawn.size == (8 * (224 + 8) + 8, 224 + 16 + 18)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layer", 9), "--layer 9: the model has layers 1 to 4"),
        (("--layer", 4), "no visual token is left at layer 4; ask for one up to 3"),
        (("--duet_tokens", 0), "leaves nothing to look at"),
        (("--dominant", 99), "the vision tower gives 36 tokens"),
        (("--image", "nowhere.png"), "nowhere.png"),
    ],
)
def test_wrong_requests_for_heat_maps(world, tmp_path, capsys, more, message):
    assert main(["fig4", *heat(world, tmp_path, *more)]) == 1
    assert message in capsys.readouterr().err


def test_the_commands_are_listed_and_found(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)
    assert cli.main(["compair"]) == 1
    said = capsys.readouterr().err
    assert "unknown subcommand 'compair'" in said and "compare" in said
    assert cli.main([]) == 1
    for name, (module, _) in cli.COMMANDS.items():
        if importlib.util.find_spec(module) is None:
            continue
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "fig3", "--help"] if name == "ablate" else [name, "--help"])
        assert stopped.value.code == 0, name


def test_files_and_modules_can_be_imported_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "mine_for_cli.py"
    file.write_text("import sys\nsys.modules['llava'].mark_of_a_test = 1\n")
    assert cli.main(["--import", str(file), "--import", "json", "--help"]) == 0
    import llava

    assert llava.__dict__.pop("mark_of_a_test") == 1
    assert cli.main(["--import", str(file), "--help"]) == 0 and "mark_of_a_test" not in llava.__dict__, "ran twice"
    sys.modules.pop("mine_for_cli")
    taken = tmp_path / "json.py"
    taken.write_text("")
    assert cli.main(["--import", str(taken), "--help"]) == 1
    assert "another module 'json' already; rename the file" in capsys.readouterr().err
    for source, message in (("no/such.py", "no such file"), ("no_such_module", "no such module")):
        assert cli.main(["--import", source, "--help"]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["--import"]) == 1


def test_the_console_script_names_the_command():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nduet = "llava.cli:main"' in text
    done = subprocess.run([sys.executable, "-m", "llava.cli", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "unknown subcommand 'nothing'" in done.stderr
