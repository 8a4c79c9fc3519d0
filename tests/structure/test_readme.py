"""The README tells the truth: its tree is the real one, its links lead somewhere, and its commands have a test."""

import re

import pytest
import readme_tree
from readme_page import README, blocks, lines
from structure_helpers import ROOT


def test_the_tree_is_the_real_one():
    assert readme_tree.written(README) == readme_tree.tree(), "run `python tests/structure/readme_tree.py`"


def test_everything_in_the_tree_is_described():
    undescribed = [name for name in readme_tree.entries() if not readme_tree.describe(name.rstrip("/"))]
    assert not undescribed, f"say in a docstring, or in readme_tree.py, what they are: {undescribed}"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_every_command_has_somebody_who_runs_it():
    assert len(blocks()) >= 7
    for block in blocks():
        how = block["how"]
        assert how, f"no <!-- run: ... --> above the block that starts with {block['text'].splitlines()[0]!r}"
        if "::" in how:
            file, name = how.split("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), how
        else:
            assert how in {"ci", "plan", "python", "model", "eval"}, how


def test_ci_runs_what_the_readme_says():
    steps = re.findall(r"^step (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert lines("ci") == steps
