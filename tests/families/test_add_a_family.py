"""docs/add-a-family.md is true: its one file, outside of the package, passes the contract of all families."""

import importlib.util
import re
from pathlib import Path

import models
import pytest
import test_contract
import transformers as hf

import duet
from duet.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
CASE = models.Case(
    models._builder(
        hf.VipLlavaForConditionalGeneration, hf.VipLlavaConfig, models._clip, models._llama,
        image_token_index=models.IMAGE, vision_feature_layers=[-3, -2],
    ),
    models._inputs(models._untiled),
    models.IMAGES,
    models._config(),
    {"one image": 10, "two images": 20, "text only": 0},
    models._noops(36),
)  # fmt: skip


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The guide's file, imported from outside, and a registry that forgets it afterwards."""
    FAMILIES.names()
    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
    text = (ROOT / "docs" / "add-a-family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- file: my_family\.py -->\n```python\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "my_family.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("my_family", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_noop_is_bit_identical", ["left"]),
        ("test_noop_is_bit_identical", ["right"]),
        ("test_detach_is_exact", []),
        ("test_budgets_per_layer", [True]),
        ("test_a_batch_of_mixed_samples_equals_single_ones", ["left"]),
        ("test_a_batch_of_mixed_samples_equals_single_ones", ["right"]),
        ("test_cached_equals_recomputed_decoding", [{}]),
        ("test_cached_equals_recomputed_decoding", [{"num_beams": 3}]),
        ("test_a_training_step_reaches_projector_and_language_model", []),
        ("test_bfloat16", []),
    ],
)
def test_the_contract_holds_for_the_added_family(added, name, arguments):
    getattr(test_contract, name)(CASE, CASE.build(), *arguments)


@pytest.mark.filterwarnings("ignore")
def test_it_is_saved_and_loaded(added, tmp_path):
    test_contract.test_save_and_load_keep_the_configuration(CASE, CASE.build(), tmp_path / "model")


def test_without_the_file_the_error_names_the_type_and_the_guide():
    with pytest.raises(ValueError, match=r"model_type 'vipllava'.*supported.*llava_next.*docs/add-a-family\.md"):
        duet.attach(CASE.build(), CASE.config)
    assert (ROOT / "docs" / "add-a-family.md").exists()
