"""The self-test of `duet.selftest` for this package's models; see there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from duet import DuetConfig, selftest, tested, trace

PROMPT = [1, 4, -200, 5, 6, 7]
OPTIONS = {"max_new_tokens": selftest.STEPS, "do_sample": False}


def _model() -> Any:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # which asks for this test

    vision: dict[str, Any] = {
        "mm_vision_tower": "self-test", "mm_vision_config": dict(selftest.TOWER), "mm_vision_select_layer": -2,
        "mm_hidden_size": selftest.WIDTH, "mm_projector_type": "linear",
    }  # fmt: skip
    config = LlavaConfig(**selftest.TEXT, **vision)
    model = LlavaLlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.get_vision_tower().mark_loaded()
    return model


def off_is_bitwise() -> str:
    """A reduction that keeps all tokens changes no bit."""
    model, ids = _model(), torch.tensor([PROMPT])
    picture = torch.randn(1, 3, selftest.SIDE, selftest.SIDE)
    plain = model(ids, images=picture).logits
    model.set_reduction(DuetConfig.none())
    moved = (model(ids, images=picture).logits - plain).abs().max()
    return f"with nothing to reduce, logits move by {moved:.2g}" if moved != 0 else ""


def cached_equals_recomputed() -> str:
    """Generating with a cache gives what passes over everything said so far give; reduced, what no cache gives."""
    model, ids = _model(), torch.tensor([PROMPT])
    picture = torch.randn(1, 3, selftest.SIDE, selftest.SIDE)

    def said(use_cache: bool) -> Any:
        rest = {"output_logits": True, "return_dict_in_generate": True, "use_cache": use_cache, **OPTIONS}
        return model.generate(ids, images=picture, **rest)

    def again(sequence: Tensor) -> list[Tensor]:
        rows = (torch.cat([ids, sequence[:, :step]], dim=1) for step in range(selftest.STEPS))
        return [model(row, images=picture, use_cache=False).logits[:, -1] for row in rows]

    whole = said(use_cache=True)
    if wrong := selftest.compare_logits(whole.logits, again(whole.sequences)):
        return f"without a reduction, {wrong}"
    model.set_reduction(selftest.known_config())
    wrong = selftest.compare_logits(said(use_cache=True).logits, said(use_cache=False).logits)
    return f"reduced, {wrong}" if wrong else ""


def keeps_known_tokens() -> str:
    """Stage 1 and stage 2 keep the tokens that weights written by hand leave no doubt about."""
    model = _model()
    projector = [module for module in model.model.mm_projector.modules() if isinstance(module, nn.Linear)]
    selftest.write_by_hand(model.get_vision_tower().vision_tower, projector, model.model)
    model.set_reduction(selftest.known_config())
    with trace() as seen:
        model(torch.tensor([PROMPT]), images=selftest.known_picture())
    return selftest.compare_known(seen)


CHECKS: Mapping[str, Callable[[], str]] = {
    "llava: with nothing to reduce, the bits are the same": off_is_bitwise,
    "llava: cached decoding equals recomputed decoding": cached_equals_recomputed,
    "llava: stage 1 and stage 2 keep the known tokens": keeps_known_tokens,
}


def ensure() -> None:
    """Run the self-test once where a library was not tested in its installed version.

    Under a device or a parameter partition that makes no real weights the question is left to `from_pretrained`, which
    asks before either is entered.

    Raises:
        duet.selftest.SelfTestError: a check failed.
    """
    partition = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if torch.get_default_device().type != "meta" and not getattr(partition, "zero_init_context", None):
        selftest.ensure("llava", CHECKS, tested.RANGES)
