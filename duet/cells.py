"""Text that others wrote, safe in our tables: it breaks no row, holds no markup, starts no formula."""

from __future__ import annotations

import html
import re
import unicodedata
from typing import TypeVar

V = TypeVar("V")
_MARKDOWN = re.compile(r"([\\`*\[\]|])")
_FORMULA = ("=", "+", "-", "@")


def one_line(text: object) -> str:
    """Return the text on one line: line breaks and other control characters become spaces."""
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in str(text))
    return " ".join(shown.split())


def markdown_cell(text: object) -> str:
    """Return the text as a Markdown table shows it literally, HTML and links included."""
    return html.escape(_MARKDOWN.sub(r"\\\1", one_line(text)), quote=False)


def csv_cell(value: V) -> V | str:
    """Return a value for a CSV file; a text that a spreadsheet would run as a formula gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
