"""The self-test finds what is broken, runs once for untested versions, and is never in the way."""

import json

import pytest
import small
import torch

import duet
import llava.selftest
from duet import DuetConfig, selftest, tested
from duet.families import reduced
from duet.stage1 import local_cluster
from duet.stage2 import text_guided
from llava.model.language_model import causal_lm
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

BOTH = {**selftest.CHECKS, **llava.selftest.CHECKS}


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """No verdict is known, and new ones go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selftest, "_FAILURES", {})
    return tmp_path / "duet" / "selftest.json"


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.16.1")


@pytest.fixture
def runs(monkeypatch):
    """Counts runs of the self-test."""
    seen, real = [], selftest.run
    monkeypatch.setattr(selftest, "run", lambda checks=selftest.CHECKS: seen.append(checks) or real(checks))
    return seen


def lose_the_cache(monkeypatch):
    """What transformers 5.24 did: the cache goes by a name that nobody takes."""
    monkeypatch.setattr(reduced, "take_cache", lambda kwargs: kwargs.pop(reduced.CACHE, None) and None)
    monkeypatch.setattr(causal_lm, "take_cache", lambda kwargs: kwargs.pop(causal_lm.CACHE, None) and None)


def found(checks=None):
    return [f"{one.name}: {one.detail}" for one in selftest.run(BOTH if checks is None else checks) if not one.ok]


def test_everything_is_right_here():
    assert found() == []


def test_a_lost_cache_is_found_in_both_packages(monkeypatch):
    lose_the_cache(monkeypatch)
    messages = found()
    assert len(messages) == 2 and all("cached decoding" in one and "the cache is lost" in one for one in messages)


def test_a_wrong_order_in_stage_1_is_found(monkeypatch):
    real = local_cluster.rank_descending
    monkeypatch.setattr(local_cluster, "rank_descending", lambda scores: real(-scores))
    messages = found()
    assert len(messages) == 2 and all("stage 1 keeps patches" in one for one in messages)


def test_a_wrong_neighbourhood_in_stage_1_is_found(monkeypatch):
    real = local_cluster._attended_neighbours
    monkeypatch.setattr(local_cluster, "_attended_neighbours", lambda *args: (real(*args) + 1) % selftest.PATCHES)
    assert any("stage 1 averages patches" in one for one in found())


def test_a_wrong_order_in_stage_2_is_found(monkeypatch):
    real = text_guided._score
    monkeypatch.setattr(text_guided, "_score", lambda *args: -real(*args))
    messages = found()
    assert len(messages) == 2 and all("stage 2 keeps tokens" in one for one in messages)


def test_a_moved_bit_is_found(monkeypatch):
    real = reduced.run_decoder

    def moved(*args, **kwargs):
        out = real(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 1e-6
        return out

    monkeypatch.setattr(reduced, "run_decoder", moved)
    assert any("logits move by" in one for one in found(selftest.CHECKS))


def test_a_check_that_raises_has_found_something():
    def broken():
        raise TypeError("forward() got an unexpected keyword argument 'cache'")

    (result,) = selftest.run({"a check": broken})
    assert not result.ok and result.detail == "TypeError: forward() got an unexpected keyword argument 'cache'"


def test_the_surroundings_of_the_call_do_not_matter_and_stay(kept):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert found() == []
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("number", ["5.17.0", "5.24.3", "5.20.0+local"])
def test_tested_versions_are_not_tested_again(monkeypatch, runs, number):
    monkeypatch.setattr("transformers.__version__", number)
    duet.attach(small.build(), DuetConfig(dominant=8, contextual=2, schedule={}))
    assert not runs


@pytest.mark.parametrize("number", ["5.16.2", "5.25.0", "6.0.0", "5.25.0.dev0", "unknown"])
def test_an_untested_version_that_computes_rightly_is_tested_once(monkeypatch, runs, kept, caplog, number):
    monkeypatch.setattr("transformers.__version__", number)
    for _ in range(2):
        duet.attach(small.build(), DuetConfig(dominant=8, contextual=2, schedule={}))
    assert len(runs) == 1
    assert f"transformers {number} (tested: >=5.17,<5.25): not tested, but the self-test passes" in caplog.text
    assert list(json.loads(kept.read_text()).values()) == [[]]
    monkeypatch.setattr(selftest, "_FAILURES", {})  # another process
    duet.attach(small.build(), DuetConfig(dominant=8, contextual=2, schedule={}))
    assert len(runs) == 1


def test_an_untested_version_that_computes_wrongly_is_refused(monkeypatch, untested, runs):
    lose_the_cache(monkeypatch)
    message = (
        r"transformers 5\.16\.1 \(tested: >=5\.17,<5\.25\).*cached decoding.*pip install 'transformers>=5\.17,<5\.25'"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            duet.attach(small.build(), DuetConfig(dominant=8, contextual=2, schedule={}))
    monkeypatch.setattr(selftest, "_FAILURES", {})
    with pytest.raises(selftest.SelfTestError, match=message):
        duet.attach(small.build(), DuetConfig(dominant=8, contextual=2, schedule={}))
    assert len(runs) == 1


def test_llava_models_ask_too_without_attach(monkeypatch, untested, tmp_path):
    lose_the_cache(monkeypatch)
    message = r"llava computes wrong results with transformers 5\.16\.1.*llava: cached decoding"
    with pytest.raises(ValueError, match=message):
        LlavaLlamaForCausalLM(LlavaConfig(**selftest.TEXT))
    with pytest.raises(ValueError, match=message):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_fix_of_the_packages_is_tested_anew(monkeypatch, untested, runs):
    selftest.ensure()
    monkeypatch.setattr(selftest, "_FAILURES", {})
    monkeypatch.setattr(selftest.hashlib, "sha256", selftest.hashlib.md5)  # as if a source file had changed
    selftest.ensure()
    assert len(runs) == 2


@pytest.mark.parametrize("damage", ["torn", "a list", "a folder", "unwritable"])
def test_a_useless_cache_is_no_obstacle(untested, runs, kept, damage):
    if damage == "unwritable":
        kept.parent.write_text("a file where the folder should be")
    else:
        kept.parent.mkdir(parents=True)
        kept.mkdir() if damage == "a folder" else kept.write_text('{"a": [' if damage == "torn" else "[]")
    selftest.ensure()
    selftest.ensure()
    assert len(runs) == 1


def test_where_nothing_is_installed_nothing_is_outside(monkeypatch):
    monkeypatch.setattr(tested, "installed", lambda name: None)
    assert tested.outside() == {}
