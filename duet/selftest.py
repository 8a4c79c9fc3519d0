"""Does this installation compute what it must? Three checks on tiny models, in a second or two, on the CPU.

Nothing here compares with numbers that a run gave: bits are compared with the model's own, cached decoding with
recomputed decoding, and the tokens that stay with those that weights written by hand leave no doubt about.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from duet import tested
from duet.config import DuetConfig
from duet.tracing import Trace, trace

logger = logging.getLogger(__name__)

SIDE, PATCH = 16, 4  # 16 patches
PATCHES = (SIDE // PATCH) ** 2
WIDTH, LAYERS, IMAGE, VOCABULARY = 16, 4, 30, 32
STEPS = 4
TOLERANCE = 1e-3
TOWER = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 1,
    "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3,
}  # fmt: skip
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 1,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def known_config() -> DuetConfig:
    """The reduction under which the known tokens stay; made when asked for, because methods are files that may go."""
    return DuetConfig(dominant=5, contextual=1, cluster_width=3, schedule={1: 0.5, 3: 0.0})


class SelfTestError(ValueError):
    """The installed versions compute something else than they must."""


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        name: what was checked.
        ok: whether it is right.
        detail: what is wrong, "" where nothing is.
    """

    name: str
    ok: bool
    detail: str = ""


# Known tokens. The picture has one red and one green value per patch, and every attention is written by hand:
# the tower's rows attend by red, the same from everywhere, so that stage 1 ranks by red; the text attends by green, so
# that stage 2 does. Nothing else is added to a hidden state.
BY_RED = (5, 12, 0, 9, 14, 3, 7, 10, 1, 15, 6, 2, 11, 8, 4, 13)
"""The patches, reddest first: the first five are dominant, the sixth is the cluster's centre, with the next two."""
GREEN = {0: 0.2, 5: 0.9, 9: 0.4, 12: 0.3, 14: 0.6, 3: 0.1, 7: 0.95, 10: 0.9}
"""Of dominant tokens 0, 5, 9, 12, 14 and the cluster's mean 0.65 the greenest three are 5, the cluster and 14."""
SOURCE, MEMBERS, KEPT = [0, 5, 9, 12, 14, 3], [[3, 7, 10]], {1: [1, 4, 5], 3: []}


def known_picture() -> Tensor:
    """Return the picture of the known tokens, [1, 3, 16, 16]."""
    red = torch.zeros(PATCHES)
    red[list(BY_RED)] = torch.arange(PATCHES, 0, -1) / PATCHES
    green = torch.tensor([GREEN.get(patch, 0.0) for patch in range(PATCHES)])
    side = SIDE // PATCH
    values = torch.stack([red, green, torch.zeros(PATCHES)]).view(1, 3, side, side)
    return values.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


@torch.no_grad()
def write_by_hand(tower: Any, projector: Iterable[nn.Linear], decoder: Any) -> None:
    """Write weights under which the tokens that stay are known. Source: the comment above ``BY_RED``.

    Channels: 0 red, 1 minus red, 2 green, 3 minus green, 4 and 5 a large constant and its negative, so that no
    normalisation changes an order; 6 marks text.
    """
    body = getattr(tower, "vision_model", tower)
    for module in (*_weights(body.embeddings), *_weights(body.encoder), *_weights(decoder.layers)):
        module.zero_()
    for norm in (m for part in (body, decoder) for m in part.modules() if "norm" in type(m).__name__.lower()):
        norm.weight.fill_(1.0)
    pixels = body.embeddings.patch_embedding.weight
    for colour, channel in ((0, 0), (1, 2)):
        pixels[channel, colour], pixels[channel + 1, colour] = PATCH**-2, -(PATCH**-2)
    body.embeddings.position_embedding.weight[:, 4] = 10.0
    body.embeddings.position_embedding.weight[:, 5] = -10.0
    for block in body.encoder.layers:
        block.self_attn.q_proj.bias[0] = 4.0
        block.self_attn.k_proj.weight[0, 0] = 20.0
    for linear in projector:
        linear.weight.copy_(torch.eye(WIDTH))
        linear.bias.zero_()
    decoder.embed_tokens.weight.zero_()[:, 6] = 1.0
    turns_least = WIDTH // 2 - 1  # the rotary pair with the lowest frequency
    for block in decoder.layers:
        block.self_attn.q_proj.weight[turns_least, 6] = 2.0
        block.self_attn.k_proj.weight[turns_least, 2] = 20.0


def _weights(module: nn.Module) -> Iterator[Tensor]:
    return (parameter.data for parameter in module.parameters())


def compare_known(seen: Trace) -> str:
    """Return what differs between the tokens that stayed and the known ones, "" if nothing does."""
    if len(seen.images) != 1:
        return f"{len(seen.images)} pictures were reduced, not one"
    image = seen.images[0]
    found = (image.source, [sorted(group) for group in image.members], image.kept_after)
    names = ("stage 1 keeps patches", "stage 1 averages patches", "stage 2 keeps tokens")
    wrong = [
        f"{name} {got}, not {right}"
        for name, got, right in zip(names, found, (SOURCE, MEMBERS, KEPT), strict=True)
        if got != right
    ]
    return "; ".join(wrong)


def compare_logits(one: Iterable[Tensor], two: Iterable[Tensor]) -> str:
    """Return at which step of decoding logits differ, "" if they are equal. Shapes: each [1, V]."""
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        off = (a - b).abs().max().item()
        if not off <= TOLERANCE * max(1.0, b.abs().max().item()):
            return f"token {step + 1} of {STEPS} has logits that are off by {off:.2g}: the cache is lost or wrong"
    return ""


@contextmanager
def plain_surroundings(seed: int = 0) -> Iterator[None]:
    """Compute as at a process's start, whatever surrounds the call, and leave the random numbers as they were."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators, too
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)  # more of them cost more than such small models give
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)


def _model() -> Any:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**TOWER), image_token_index=IMAGE,
        image_seq_length=PATCHES, projector_hidden_act="linear",
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def _inputs(picture: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 4, *[IMAGE] * PATCHES, 5, 6, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture}


def _attach(model: Any, config: DuetConfig) -> Any:
    from duet.attach import attach  # which asks for this test where versions were not tested

    return attach(model, config)


def off_is_bitwise() -> str:
    """An attachment that keeps all tokens changes no bit, and none is left after detach."""
    model, inputs = _model(), _inputs(torch.randn(1, 3, SIDE, SIDE))
    plain = model(**inputs).logits
    with _attach(model, DuetConfig.none()):
        attached = model(**inputs).logits
    if not torch.equal(attached, plain):
        return f"attached with nothing to reduce, logits move by {(attached - plain).abs().max():.2g}"
    return "" if torch.equal(model(**inputs).logits, plain) else "after detach the logits are not the model's own"


def cached_equals_recomputed() -> str:
    """Generating with a cache gives what passes over everything said so far give: the host's own, and reduced ones."""
    model, inputs = _model(), _inputs(torch.randn(1, 3, SIDE, SIDE))
    prompt = inputs["input_ids"].shape[1]

    def again(sequence: Tensor, **hint: int) -> list[Tensor]:
        rest = {"pixel_values": inputs["pixel_values"], "use_cache": False, **hint}
        return [model(input_ids=sequence[:, : prompt + step], **rest).logits[:, -1] for step in range(STEPS)]

    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with _attach(model, DuetConfig.none()):
        whole = model.generate(**inputs, **options)
    with _attach(model, known_config()):
        reduced = model.generate(**inputs, **options)
        reduced_again = again(reduced.sequences, prompt_length=prompt)
    if wrong := compare_logits(whole.logits, again(whole.sequences)):
        return f"without a reduction, {wrong}"
    wrong = compare_logits(reduced.logits, reduced_again)
    return f"reduced, {wrong}" if wrong else ""


def keeps_known_tokens() -> str:
    """Stage 1 and stage 2 keep the tokens that weights written by hand leave no doubt about."""
    model = _model()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    write_by_hand(tower, (projector.linear_1, projector.linear_2), model.model.language_model)
    with _attach(model, known_config()), trace() as seen:
        model(**_inputs(known_picture()))
    return compare_known(seen)


CHECKS: Mapping[str, Callable[[], str]] = {
    "attached with nothing to reduce, the bits are the model's own": off_is_bitwise,
    "cached decoding equals recomputed decoding": cached_equals_recomputed,
    "stage 1 and stage 2 keep the known tokens": keeps_known_tokens,
}
"""What is checked; each returns what is wrong, "" if nothing is."""


def run(checks: Mapping[str, Callable[[], str]] = CHECKS) -> list[Result]:
    """Run checks; one that raises has found something, too."""
    results, token = [], _RUNNING.set(True)
    try:
        for name, check in checks.items():
            wrong = _findings_of(check)
            results.append(Result(name, not wrong, wrong))
    finally:
        _RUNNING.reset(token)
    return results


def _findings_of(check: Callable[[], str]) -> str:
    try:
        with plain_surroundings():
            return check()
    except Exception as error:  # whatever a changed library raises is the finding
        said = str(error).splitlines()
        return f"{type(error).__name__}: {said[0] if said else ''}"


_RUNNING: ContextVar[bool] = ContextVar("duet_selftest", default=False)
"""Whether the models that are made and attached to here are the self-test's own."""
_LOCK = threading.Lock()
_FAILURES: dict[str, list[str]] = {}


def ensure(
    package: str = "duet",
    checks: Mapping[str, Callable[[], str]] = CHECKS,
    libraries: Iterable[str] = ("torch", "transformers"),
) -> None:
    """Where a library was not tested in its installed version, run the self-test once and keep the verdict.

    The verdict lies in the user's cache folder, for these versions and these sources; where that cannot be read or
    written, every process finds its own.

    Args:
        package: whose checks they are.
        checks: as ``CHECKS``.
        libraries: whose versions matter.

    Raises:
        SelfTestError: a check failed; the message names the versions, what is wrong and the remedy.
    """
    untested = tested.outside(libraries)
    if not untested or _RUNNING.get():
        return
    key = _key(package, libraries)
    with _LOCK:
        if key not in _FAILURES:
            _FAILURES[key] = _verdict(key, checks, untested)
        failures = _FAILURES[key]
    if failures:
        raise SelfTestError(
            f"{package} computes wrong results with {tested.described(untested)}: {'; '.join(failures)}. "
            f"Remedy: {tested.remedy(untested)}; then `duet doctor` tests again"
        )


def remember(package: str, results: Iterable[Result], libraries: Iterable[str] = ("torch", "transformers")) -> None:
    """Keep what a run of the self-test found, in place of what was kept."""
    key = _key(package, libraries)
    failures = [f"{one.name}: no, {one.detail}" for one in results if not one.ok]
    with _LOCK:
        _FAILURES[key] = failures
    _write(key, failures)


def _verdict(key: str, checks: Mapping[str, Callable[[], str]], untested: dict[str, str]) -> list[str]:
    kept = _read().get(key)
    if isinstance(kept, list):
        return [str(one) for one in kept]
    failures = [f"{one.name}: no, {one.detail}" for one in run(checks) if not one.ok]
    if not failures:
        logger.warning("%s: not tested, but the self-test passes", tested.described(untested))
    _write(key, failures)
    return failures


def _key(package: str, libraries: Iterable[str]) -> str:
    """Return versions and sources that a verdict holds for."""
    versions = ", ".join(f"{name} {tested.installed(name)}" for name in libraries)
    files = hashlib.sha256()
    for root in {"duet", package}:
        for folder in sys.modules[root].__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                stat = path.stat()
                files.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return f"{package} {files.hexdigest()[:16]}: {versions}"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "duet" / "selftest.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:  # not there, torn, or no home
        logger.debug("no verdicts of the self-test are kept: %s", error)
        return {}
    return found if isinstance(found, dict) else {}


def _write(key: str, failures: list[str]) -> None:
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(_read() | {key: failures}, file, indent=1)
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:
        logger.debug("the verdict of the self-test cannot be kept: %s", error)
