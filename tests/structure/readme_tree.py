"""The README's tree of folders, made from the files: `python tests/structure/readme_tree.py` writes it again.

A package is described by the first sentence of its docstring, any other folder here. Files are not listed: each says
at its top what it is.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from structure_helpers import ROOT, shipped_files

README = ROOT / "README.md"
START, END = "<!-- tree: start -->\n```\n", "```\n<!-- tree: end -->"
CLOSED = {
    ".ci": "what runs on every change",
    "docs/images": "pictures of the documents",
    "docs/results": "what benchmarks and trainings gave, with command, machine and date",
    "llava/eval": "asking a model, and scoring its answers",
    "llava/model": "tower, projector, splice, decoders, checkpoints",
    "llava/train": "data, trainer, recipes, launcher",
    "llava/serve": "chat",
    "scripts/lib": "the launcher, and how an environment is made",
    "scripts/v1_5": "LLaVA-1.5's training and benchmarks, by LLaVA's script names",
    "playground/data": "where real data goes (ignored by git)",
    "playground/tiny/weights": "the tiny world's backbones and tokenizer",
    "tests/bench": "benchmark, probe, overlays, allocations",
    "tests/clients": "what code written for LLaVA finds here: names, scripts, whole clients",
    "tests/data": "records, labels, collator, sampler, pre-flight scan",
    "tests/duet": "config, stages, decoder, cache, attach, golden parity",
    "tests/eval": "benchmarks, runner, report, comparison, videos and judge, lmms-eval",
    "tests/families": "every model family, by one contract; long videos",
    "tests/golden": "numbers that the published implementations produced on tiny models",
    "tests/kernels": "Triton kernels against their PyTorch twins",
    "tests/model": "LLaVA models, checkpoints, generation",
    "tests/readme": "the README's commands and examples",
    "tests/structure": "the house rules",
    "tests/tiny": "the tiny world",
    "tests/trl_trainers": "TRL's trainers on an attached model (`make test-trl`)",
    "tests/train": "flags, trainer, resume, scripts",
}
DESCRIBED = {
    "docs": "decisions, paper index, training, log, results",
    "duet": "LIBRARY: token reduction; torch and transformers, never llava",
    "duet/families": "one file per Hugging Face model family",
    "duet/stage1": "vision reducers: tower features in, fewer tokens out",
    "duet/stage2": "language reducers: which visual tokens stay",
    "llava": "APPLICATION: LLaVA-1.5's names and layouts",
    "playground": "the tiny world, and room for real data",
    "playground/tiny": "photographs with handwritten digits, and two small backbones",
    "scripts": "our training on one launcher; LLaVA's training scripts and converters",
    "tests": "all tests; markers gpu and slow",
}
WIDTH = 34


def first_sentence(path: Path) -> str:
    """What a file says about itself first."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        doc = " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())
    else:
        doc = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
    doc = re.split(r"(?<!Sec)(?<!Eq)\. (?=[A-Z`])", doc)[0]
    if len(doc) > 90 and 15 <= doc.find(": ") <= 90:
        doc = doc.split(": ")[0]
    doc = doc.rstrip(".:").replace("``", "").replace("`", "")
    return doc if len(doc) <= 90 else doc[:90].rsplit(" ", 1)[0] + " ..."


def describe(name: str) -> str:
    """One line for a file or folder."""
    if name in DESCRIBED or name in CLOSED:
        return DESCRIBED.get(name) or CLOSED.get(name, "")
    path = ROOT / name
    if path.is_dir():
        return first_sentence(path / "__init__.py") if (path / "__init__.py").exists() else ""
    return first_sentence(path) if path.suffix in {".py", ".sh", ".md"} else ""


def entries() -> list[str]:
    """Folders in the order of the tree, closed folders without their content."""
    names: set[str] = set()
    for path in [*shipped_files(), *[ROOT / name / "x" for name in CLOSED if (ROOT / name).is_dir()]]:
        parts = path.relative_to(ROOT).parts
        for depth in range(1, len(parts)):
            name = "/".join(parts[:depth])
            names.add(name + "/")
            if name in CLOSED:
                break
    return sorted(names)


def tree() -> str:
    """The tree as text."""
    lines = []
    for name in entries():
        parts = name.rstrip("/").split("/")
        shown = "  " * (len(parts) - 1) + parts[-1] + ("/" if name.endswith("/") else "")
        lines.append(f"{shown:<{WIDTH}} {describe(name.rstrip('/'))}".rstrip())
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The tree that a README has now."""
    return text.split(START)[1].split(END)[0]


if __name__ == "__main__":
    page = README.read_text(encoding="utf-8")
    README.write_text(page.replace(START + written(page) + END, START + tree() + END), encoding="utf-8")
