"""The README's code blocks, and who runs them (the comment above each block says it)."""

import re

from structure_helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- run: (?P<how>[^>]+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


def blocks(how=None):
    return [match for match in BLOCK.finditer(README) if how is None or match["how"] == how]


def lines(how):
    return [line for block in blocks(how) for line in block["text"].splitlines() if line.strip()]
