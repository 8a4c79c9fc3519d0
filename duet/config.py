"""``DuetConfig``: what is kept where, validated, and stored in a model's ``config.json`` under ``"duet"``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from duet import budget
from duet.checks import (
    check_choice,
    check_count,
    check_depth,
    check_name,
    check_seed,
    clean_across_frames,
    clean_counts_or_shares,
    clean_options,
    clean_queries,
    clean_schedule,
    shown,
)
from duet.presets import PRESETS

QUERIES = ("last", "all", "salient")
POSITIONS = ("auto", "compact", "original", "patch")
VARIANTS = ("paper", "release")
PER = ("pass", "picture")
CONFIG_KEY = "duet"
_STAGE2 = "text_guided"


def _default_schedule() -> dict[int, float]:
    return {16: 0.5, 24: 0.0}


@dataclass(frozen=True, kw_only=True)
class DuetConfig:
    """Which visual tokens survive, in the vision tower (stage 1) and in the language model (stage 2).

    Attributes:
        dominant: ``k1``, the most attended patches, kept as they are (tokens per tower pass). A float between 0 and 1
            is a share of the patches, for towers whose pictures differ in size.
        contextual: ``k2``, tokens that each average a local cluster of the rest (tokens per tower pass, or a share).
        cluster_width: ``w``, how many residual tokens one contextual token averages.
        schedule: number of decoder layers that have run -> share of the entering visual tokens that is kept.
        queries: the text rows that rank visual tokens in stage 2: ``"last"``, ``"all"``, ``"salient"``, or a tuple of
            indices among the rows of ``"all"`` (negative ones count from the end).
        positions: ``"compact"`` renumbers 0..n-1 after a drop, ``"original"`` keeps the numbers that tokens entered
            with, ``"auto"`` is compact for 1-D rotary positions and original for multi-axis ones. ``"patch"`` counts as
            if nothing had been taken out: a token has the number of its patch, or of its cluster's centre, and what
            follows the picture the number that it has without a reduction (beyond the paper; LLaVA-1.5 only).
        variant: ``"paper"`` is Algorithm 1; ``"release"`` is the code that its authors published.
        stage1: name of the vision reducer, or ``"none"``. Any of them hands on ``dominant + contextual`` tokens.
        stage2: name of the language reducer, which acts where ``schedule`` says.
        salient_tokens: how many text tokens ``queries="salient"`` picks besides the last one.
        depth: the number of decoder layers that ``schedule`` was written for; it is rescaled to the model's depth.
            ``None`` takes the layers literally.
        seed: what choices at random start from, in the methods that make any.
        options: settings that only the chosen methods know, by name; each has a default (see ``Registry.register``).
        per: what has ``dominant + contextual`` tokens: ``"pass"``, every tower pass (a tile, a frame), so that larger
            pictures keep more; or ``"picture"``, an image or a video, whose passes share the counts evenly.
        across_frames: how many of the tokens that stage 1 leaves of a video's frames stay, as a count or as a share
            between 0 and 1; the others repeat what earlier frames show at their place and are averaged into those
            (``duet.over_time``). None leaves every frame its own tokens.

    Raises:
        ValueError: a field is out of range; the message names it.
    Source: DUET-VLM Sec. 3, Algorithm 1, Tables 12-15.
    """

    dominant: int | float = 300
    contextual: int | float = 7
    cluster_width: int = 4
    schedule: Mapping[int, float] = field(default_factory=_default_schedule)
    queries: str | tuple[int, ...] = "last"
    positions: str = "auto"
    variant: str = "paper"
    stage1: str = "local_cluster"
    stage2: str = _STAGE2
    salient_tokens: int = 5
    depth: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    per: str = "pass"
    across_frames: int | float | None = None

    def __post_init__(self) -> None:
        self._check_stage1()
        self._check_stage2()
        given = isinstance(self.options, Mapping) and self.options
        known = declared_options(self.stage1, self.stage2) if given else {}
        methods = f"stage1={self.stage1!r} and stage2={self.stage2!r}"
        self._store(options=clean_options(self.options, known, methods))
        self._check_methods()

    def _store(self, **values: Any) -> None:
        """Replace fields by their checked form; for the constructor alone."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_methods(self) -> None:
        from duet.stage1 import VISION_REDUCERS
        from duet.stage2 import LANGUAGE_REDUCERS

        if self.stage1 != "none":
            VISION_REDUCERS.check(self.stage1, self)
        LANGUAGE_REDUCERS.check(self.stage2, self)

    def _check_stage1(self) -> None:
        dominant, contextual = clean_counts_or_shares(self.dominant, self.contextual)
        self._store(dominant=dominant, contextual=contextual, across_frames=clean_across_frames(self.across_frames))
        check_count("cluster_width", self.cluster_width, least=1)
        check_count("salient_tokens", self.salient_tokens, least=1)
        check_choice("variant", self.variant, VARIANTS)
        check_choice("per", self.per, PER)
        check_name("stage1", self.stage1)
        if self.stage1 != "none":
            from duet.stage1 import VISION_REDUCERS

            VISION_REDUCERS.get(self.stage1)
            if not self.in_shares and self.entering < 1:
                raise ValueError("dominant + contextual must be at least 1; use stage1='none' to keep every patch")
            if self.counts_class_token and not self.in_shares and self.dominant < 1:
                raise ValueError("dominant must be at least 1 here: the class token counts as one dominant token")

    def _check_stage2(self) -> None:
        from duet.stage2 import LANGUAGE_REDUCERS

        self._store(schedule=clean_schedule(self.schedule), queries=clean_queries(self.queries, QUERIES))
        check_name("stage2", self.stage2)
        if self.schedule or self.stage2 != _STAGE2:  # DUET's own, where nothing asks for it, may be absent
            LANGUAGE_REDUCERS.get(self.stage2)
        check_seed(self.seed)
        check_choice("positions", self.positions, POSITIONS)
        if self.depth is not None:
            check_count("depth", self.depth, least=1)
            check_depth(self.schedule, self.depth)

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    @property
    def entering(self) -> int:
        """``k1 + k2``: visual tokens that stage 1 hands on per tower pass.

        Raises:
            ValueError: they are shares; ``for_patches`` turns them into counts.
        """
        if self.in_shares:
            raise ValueError("dominant and contextual are shares; for_patches(n) gives the counts for n patches")
        return int(self.dominant + self.contextual)

    @property
    def in_shares(self) -> bool:
        """Whether ``dominant`` and ``contextual`` are shares of the patches."""
        return isinstance(self.dominant, float) or isinstance(self.contextual, float)

    def for_patches(self, patches: int) -> DuetConfig:
        """Return the same configuration with shares as counts of ``patches`` patches, rounded; at least one stays."""
        if not self.in_shares:
            return self
        dominant = round(self.dominant * patches)
        contextual = min(round(self.contextual * patches), patches - dominant)
        if dominant + contextual == 0 or (self.counts_class_token and dominant == 0):
            dominant = 1
        return replace(self, dominant=dominant, contextual=contextual)

    def option(self, name: str) -> Any:
        """Return one of ``options``, or the default that the chosen methods declare for it.

        Raises:
            KeyError: neither method declares it.
        """
        if name in self.options:
            return self.options[name]
        default = declared_options(self.stage1, self.stage2)[name]
        return default[0] if isinstance(default, tuple) else default

    @classmethod
    def none(cls) -> DuetConfig:
        """Return the configuration that reduces nothing."""
        return cls(stage1="none", schedule={})

    @classmethod
    def preset(cls, name: str, tokens: int, **overrides: Any) -> DuetConfig:
        """Return a row of the paper's Tables 12-15, for one tower pass, or with ``per="picture"`` as it is printed.

        Args:
            name: a key of ``duet.presets.PRESETS``, for example ``"llava-1.5-7b"``.
            tokens: the row, by its nominal average of visual tokens per layer.
            **overrides: fields to change, for example ``queries="all"``.

        Raises:
            ValueError: no such preset or row; the message lists what there is.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {shown(name)}; known: {', '.join(sorted(PRESETS))}")
        rows = PRESETS[name]
        check_count("tokens", tokens, least=1)
        if tokens not in rows:
            raise ValueError(
                f"preset {name!r} has rows {sorted(rows)}, not {tokens}; use budget.solve_entering for others"
            )
        row = rows[tokens]
        per = overrides.get("per", row.per)
        units = 1 if per == "picture" else row.units
        values: dict[str, Any] = {
            "dominant": row.dominant // units,
            "contextual": row.contextual // units,
            "schedule": dict(row.schedule),
            "depth": row.depth,
            "per": per,
            **dict(row.fields),
        }
        return cls(**(values | overrides))

    def for_depth(self, num_layers: int) -> DuetConfig:
        """Return the same configuration with its schedule in layers of a decoder of ``num_layers``.

        Raises:
            ValueError: a stage lies beyond the depth, or two stages fall on one layer after rescaling.
        """
        schedule = self.schedule
        if self.depth is not None and self.depth != num_layers:
            scaled = [(round(layer * num_layers / self.depth), ratio) for layer, ratio in schedule.items()]
            if len({layer for layer, _ in scaled}) < len(scaled) or any(layer < 1 for layer, _ in scaled):
                raise ValueError(f"schedule {dict(schedule)} for {self.depth} layers does not fit into {num_layers}")
            schedule = dict(scaled)
        check_depth(schedule, num_layers)
        return replace(self, schedule=schedule, depth=num_layers)

    def validate(self, patches: int | None, num_layers: int, class_token: bool = True) -> None:
        """Check the configuration against a model.

        Args:
            patches: patches per tower pass; None where pictures differ in size, so that no budget is too large.
            num_layers: decoder depth.
            class_token: whether the tower has a class token.

        Raises:
            ValueError: more tokens are asked for than there are patches, or the schedule does not fit the depth.
        """
        self.for_depth(num_layers)
        if self.stage1 == "none" or self.adaptive or self.in_shares or patches is None or self.per == "picture":
            return
        available = patches + int(class_token and self.counts_class_token)
        if self.entering > available:
            raise ValueError(
                f"dominant + contextual = {self.dominant} + {self.contextual} = {self.entering}, but the vision tower "
                f"gives {available} tokens per image; lower one of them"
            )

    @property
    def counts_class_token(self) -> bool:
        """Whether the class token is forwarded as one of the dominant tokens (the released code and VisionZip do)."""
        return self.stage1 == "visionzip" or (self.stage1 == "local_cluster" and self.variant == "release")

    @property
    def adaptive(self) -> bool:
        """Whether stage 1 finds the number of tokens image by image; ``entering`` then says nothing."""
        from duet.stage1 import VISION_REDUCERS

        return self.stage1 != "none" and getattr(VISION_REDUCERS.get(self.stage1), "adaptive", False)

    def entering_tokens(self, patches: int) -> int:
        """Return the visual tokens that enter the language model per tower pass of ``patches`` patches.

        For an adaptive method this is the most that may enter; what did is in the trace.
        """
        return patches if self.stage1 == "none" or self.adaptive else self.for_patches(patches).entering

    def tokens_per_layer(self, patches: int, num_layers: int) -> list[int]:
        """Return the visual tokens that each decoder layer sees for one image."""
        config = self.for_depth(num_layers)
        return budget.tokens_per_layer(self.entering_tokens(patches), config.schedule, num_layers)

    def average_tokens(self, patches: int, num_layers: int) -> float:
        """Return the mean of ``tokens_per_layer``."""
        return sum(self.tokens_per_layer(patches, num_layers)) / num_layers

    def is_noop(self, patches: int) -> bool:
        """Return whether nothing is removed or changed for a tower pass of ``patches`` patches."""
        all_kept = self.across_frames is None and (self.stage1 == "none" or self.keeps_every_patch(patches))
        return all_kept and all(ratio == 1.0 for ratio in self.schedule.values())

    def keeps_every_patch(self, patches: int) -> bool:
        """Return whether stage 1 hands on ``patches`` patches as they are, whatever its method.

        That is so where ``dominant`` is all of them. A method that hands on the class token as one of the dominant ones
        would lose a patch to it; as many tokens as patches are the patches.
        """
        counts = self.for_patches(patches)
        return counts.dominant == patches and counts.contextual == 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; ``from_dict`` reads it back."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["schedule"] = {str(layer): ratio for layer, ratio in self.schedule.items()}
        out["queries"] = self.queries if isinstance(self.queries, str) else list(self.queries)
        out["options"] = dict(self.options)
        # left out, so that digests of older settings stay
        for name, usual in (("options", {}), ("per", "pass"), ("across_frames", None)):
            if out[name] == usual:
                del out[name]
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DuetConfig:
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: it is no mapping, a field is unknown (the message lists the known ones) or out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a duet configuration maps names of fields to values, got {shown(values)}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(name if isinstance(name, str) else shown(name) for name in values if name not in known)
        if unknown:
            raise ValueError(
                f"unknown field(s) {', '.join(unknown)} in the duet configuration; known: {', '.join(known)}"
            )
        return cls(**values)

    @classmethod
    def from_model_config(cls, config: object) -> DuetConfig | None:
        """Return what a model's configuration carries under ``"duet"``, or None.

        Raises:
            ValueError: the entry is broken; the message says whose it is.
        """
        stored = getattr(config, CONFIG_KEY, None)
        if stored is None:
            return None
        try:
            return cls.from_dict(stored)
        except ValueError as error:
            whose = getattr(config, "_name_or_path", None) or f"a {type(config).__name__}"
            raise ValueError(f'the entry "{CONFIG_KEY}" in the configuration of {whose}: {error}') from error

    @classmethod
    def require(cls, config: object) -> DuetConfig:
        """Return what a caller gave as a configuration, if it is one.

        Raises:
            ValueError: it is something else; the message says how to make one of it.
        """
        if isinstance(config, cls):
            return config
        how = "DuetConfig.from_dict reads a dictionary" if isinstance(config, Mapping) else "make one by its fields"
        raise ValueError(f"the configuration must be a DuetConfig, got {shown(config)}; {how}")


def declared_options(stage1: str, stage2: str) -> dict[str, Any]:
    """Return the options that a vision reducer (or ``"none"``) and a language reducer declare, with their defaults."""
    from duet.stage1 import VISION_REDUCERS
    from duet.stage2 import LANGUAGE_REDUCERS

    vision = {} if stage1 == "none" else VISION_REDUCERS.options(stage1)
    return (LANGUAGE_REDUCERS.options(stage2) if stage2 in LANGUAGE_REDUCERS.names() else {}) | vision
