"""The token-reduction flags: one group, with the same names in training, evaluation and on the command line."""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from duet import DuetConfig
from duet.config import CONFIG_KEY, declared_options
from duet.methods import check_pair

_PRESET, _TILED_PRESET = "llava-1.5-7b", "llava-next-7b"
# The default schedule is the paper's, written for 32 layers; other depths scale it.
_PAPER_DEPTH = 32


def _flag(text: str, aliases: Sequence[str] = (), **options: Any) -> Any:
    return field(default=None, metadata={"help": text, "aliases": list(aliases), **options})


@dataclass
class ReductionArguments:
    """DUET's flags. None means "not given"; with nothing given the checkpoint's own setting holds."""

    dominant: int | None = _flag("visual tokens kept as they are after the vision tower", ["--dominant_num"])
    contextual: int | None = _flag("merged tokens after the vision tower", ["--context_num", "--contextual_num"])
    cluster_width: int | None = _flag("tokens that one merged token averages")
    layer_list: str | None = _flag("decoder layers after which visual tokens are dropped, e.g. '[16,24]' (quote it)")
    image_token_ratio_list: str | None = _flag(
        "share of the entering visual tokens that is kept after each of these layers, e.g. '[0.5,0.0]'"
    )
    duet_tokens: int | None = _flag(
        "a budget of the paper (visual tokens on average: 192, 128 or 64; with tiles, as in LLaVA-1.6, 640, 320 or "
        "160), scaled to the model's depth; 0 turns the reduction off"
    )
    queries: str | None = _flag("text rows that rank visual tokens: last, all, salient, or a list of indices")
    positions: str | None = _flag("how positions are counted: auto, compact or original after a drop, patch")
    variant: str | None = _flag("paper (Algorithm 1) or release (the published code)")
    stage1: str | None = _flag("vision reducer, by name; none keeps every patch")
    stage2: str | None = _flag("language reducer, by name; it acts at --layer_list")
    reduce: str | None = _flag("both by name, as VISION+LANGUAGE, e.g. visionzip+fastv")
    reduction_seed: int | None = _flag("what random methods start from")
    reduction_options: str | None = _flag("settings that only the chosen methods know, as name=value,name=value")
    reduction_config: str | None = _flag(
        "JSON file with a whole reduction, such as another model's config.json; other flags change what they name"
    )
    use_salient_tokens: bool | None = _flag(
        "released spelling of --queries salient", ["--compute_salient_tokens"], nargs="?", const=True
    )

    def given(self) -> dict[str, Any]:
        """Return the flags that were given."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) is not None}

    def to_config(self, default: DuetConfig | None = None, preset: str = _PRESET) -> DuetConfig | None:
        """Combine the flags with what the checkpoint says.

        Args:
            default: The checkpoint's reduction, or None.
            preset: Whose budgets `duet_tokens` names.

        Returns:
            The reduction, or None for none. With no flag given this is `default`. `duet_tokens` starts from the paper's
            preset, other flags from `default` or else from the paper's setting; layers in `layer_list` are literal.

        Raises:
            ValueError: A flag cannot be read, or two contradict each other; the message names them.
        """
        given = self.given()
        if given.get("use_salient_tokens") is False:
            del given["use_salient_tokens"]  # upstream's default, which its scripts spell out; it asks for nothing
        if not given:
            return default
        tokens = given.pop("duet_tokens", None)
        if tokens == 0:
            if given:
                raise ValueError(f"--duet_tokens 0 turns the reduction off, so --{next(iter(given))} has no effect")
            return None
        if "reduction_config" in given:
            if tokens is not None:
                raise ValueError("--reduction_config and --duet_tokens both say where to start from; give one of them")
            default = read_config(given.pop("reduction_config"))
        overrides = self._overrides(given)
        if tokens is not None:
            return DuetConfig.preset(preset, tokens=tokens, **overrides)
        base = DuetConfig(depth=_PAPER_DEPTH) if default is None else default
        return replace(base, **(overrides | {"options": _merged_options(base, overrides)}))

    def _overrides(self, given: dict[str, Any]) -> dict[str, Any]:
        names = ("dominant", "contextual", "cluster_width", "positions", "variant", "stage1", "stage2")
        overrides = {name: given[name] for name in names if name in given}
        if "reduction_seed" in given:
            overrides["seed"] = given["reduction_seed"]
        if "reduce" in given:
            overrides |= parse_pair(given["reduce"], overrides)
        if "queries" in given:
            overrides["queries"] = parse_queries(given["queries"])
        if given.get("use_salient_tokens"):
            if overrides.get("queries", "salient") != "salient":
                raise ValueError(f"--use_salient_tokens contradicts --queries {given['queries']}; give one of them")
            overrides["queries"] = "salient"
        if "reduction_options" in given:
            overrides["options"] = parse_options(given["reduction_options"])
        schedule = parse_schedule(given.get("layer_list"), given.get("image_token_ratio_list"))
        if schedule and "schedule" in overrides:
            raise ValueError(f"--reduce {given['reduce']} drops nothing in the decoder, so --layer_list has no effect")
        if schedule is not None:
            overrides |= {"schedule": schedule, "depth": None}
        return overrides

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags to an argparse parser."""
        group = parser.add_argument_group(
            "DUET", "visual token reduction; without flags the checkpoint's setting holds"
        )
        # Not from the fields: HfArgumentParser rewrites their types.
        hints = get_type_hints(cls)
        for item in fields(cls):
            kind = get_args(hints[item.name])[0]
            kind = _boolean if kind is bool else kind
            options = {key: value for key, value in item.metadata.items() if key != "aliases"}
            group.add_argument(f"--{item.name}", *item.metadata["aliases"], type=kind, default=None, **options)

    @classmethod
    def from_namespace(cls, namespace: Any) -> ReductionArguments:
        """Read the flags from parsed arguments (or any object that has some of them as attributes)."""
        return cls(**{item.name: getattr(namespace, item.name, None) for item in fields(cls)})


def preset_for(config: Any) -> str:
    """Return whose rows of the paper `--duet_tokens` names for a LLaVA model.

    Args:
        config: The model's configuration, or anything else with LLaVA's `image_aspect_ratio`.

    Returns:
        LLaVA-1.6's preset (Table 13) where pictures are cut into tiles, else LLaVA-1.5's (Table 12).
    """
    return _TILED_PRESET if "anyres" in (getattr(config, "image_aspect_ratio", None) or "") else _PRESET


def read_config(path: str) -> DuetConfig:
    """Read a reduction from a JSON file: what `DuetConfig.to_dict` gives, alone or under "duet".

    Raises:
        ValueError: There is no such file, or it holds something else; the message names it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--reduction_config {path} cannot be read as JSON: {error}") from error
    if isinstance(values, dict) and "model_type" in values and CONFIG_KEY not in values:
        raise ValueError(f"--reduction_config {path} is a model's configuration without a reduction in it")
    values = values.get(CONFIG_KEY, values) if isinstance(values, dict) else values
    try:
        return DuetConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--reduction_config {path}: {error}") from error


def parse_pair(text: str, given: dict[str, Any]) -> dict[str, Any]:
    """Read `VISION+LANGUAGE`, where either name may be `none`.

    Raises:
        ValueError: It is no pair, the two cannot be combined, or `--stage1` or `--stage2` was given as well.
    """
    names = [name.strip() for name in text.split("+")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"--reduce must be VISION+LANGUAGE, for example visionzip+fastv or none+fastv, got {text!r}")
    if {"stage1", "stage2"} & set(given):
        raise ValueError(f"--reduce {text} names both methods; leave --stage1 and --stage2 out")
    vision, language = names
    if names != ["none", "none"]:
        check_pair(vision, language)
    return {"stage1": vision} | ({"schedule": {}} if language == "none" else {"stage2": language})


def parse_options(text: str) -> dict[str, Any]:
    """Read `name=value,name=value`; values are numbers, `true` or `false`, or else strings.

    Raises:
        ValueError: A part has no `=`, or a name comes twice.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not name or not equals:
            raise ValueError(f"--reduction_options must be name=value,name=value, got {part!r}")
        if name in options:
            raise ValueError(f"--reduction_options gives {name} twice")
        options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _merged_options(base: DuetConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's options as far as the methods that are now chosen know them, and those that were given."""
    known = declared_options(overrides.get("stage1", base.stage1), overrides.get("stage2", base.stage2))
    return {name: value for name, value in base.options.items() if name in known} | overrides.get("options", {})


def parse_list(flag: str, text: Any) -> list:
    """Read a list such as `[16,24]` from the command line.

    Raises:
        ValueError: It is no list of numbers; the message names the flag.
    """
    if isinstance(text, str):
        try:
            value: Any = ast.literal_eval(text.strip())
        except (SyntaxError, ValueError):
            value = None
        value = [value] if isinstance(value, int | float) and not isinstance(value, bool) else value
    else:
        value = text
    numbers = isinstance(value, list | tuple) and all(
        isinstance(item, int | float) and not isinstance(item, bool) for item in value
    )
    if not numbers:
        raise ValueError(f"--{flag} {text!r} is no list of numbers; write it like '[16,24]', in quotes")
    return list(value)


def parse_schedule(layers: str | None, ratios: str | None) -> dict[int, float] | None:
    """Read the two released list flags into a schedule; None when neither was given.

    Raises:
        ValueError: One is missing, their lengths differ, or a layer is no whole number.
    """
    if layers is None and ratios is None:
        return None
    if layers is None or ratios is None:
        missing = "layer_list" if layers is None else "image_token_ratio_list"
        raise ValueError(f"--layer_list and --image_token_ratio_list belong together; --{missing} is not given")
    layer_list, ratio_list = parse_list("layer_list", layers), parse_list("image_token_ratio_list", ratios)
    if len(layer_list) != len(ratio_list):
        raise ValueError(
            f"--layer_list has {len(layer_list)} entries and --image_token_ratio_list {len(ratio_list)}; "
            "give one ratio per layer"
        )
    if any(int(layer) != layer for layer in layer_list):
        raise ValueError(f"--layer_list {layers} must hold whole numbers")
    if sorted(set(layer_list)) != layer_list:
        raise ValueError(f"--layer_list {layers} must rise, without repeats")
    return {int(layer): float(ratio) for layer, ratio in zip(layer_list, ratio_list, strict=True)}


def parse_queries(text: str) -> str | tuple[int, ...]:
    """Read `--queries`: a name, or a list of indices.

    Raises:
        ValueError: Neither.
    """
    if not text.strip().startswith(("[", "(")):
        return text
    indices = parse_list("queries", text)
    if not indices or any(int(index) != index for index in indices):
        raise ValueError(f"--queries {text} must be last, all, salient, or a list of whole numbers such as '[0,3]'")
    return tuple(int(index) for index in indices)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
