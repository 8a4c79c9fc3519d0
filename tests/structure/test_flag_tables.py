"""The documents' tables of flags are those of the code."""

import flag_tables
import pytest

from llava.reduction import ReductionArguments


@pytest.mark.parametrize("path", flag_tables.documents(), ids=lambda path: path.name)
def test_the_tables_are_current(path):
    text = path.read_text(encoding="utf-8")
    assert flag_tables.renewed(text) == text, "run `python tests/structure/flag_tables.py`"


def test_every_group_of_flags_has_its_table():
    named = {match[3] for path in flag_tables.documents() for match in flag_tables.BLOCK.finditer(path.read_text())}
    assert {"ReductionArguments", "ModelArguments", "DataArguments", "TrainingArguments"} <= named


def test_a_table_has_every_flag_with_its_other_names():
    text = flag_tables.table(ReductionArguments)
    assert "| `--dominant`, `--dominant_num` |  | visual tokens kept as they are after the vision tower |" in text
    assert text.count("\n") == 2 + len(flag_tables.own_fields(ReductionArguments))
