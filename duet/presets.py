"""The budgets of the paper's Tables 12-15, each with its source.

``dominant`` and ``contextual`` are totals per image (or video), as printed; ``units`` is the number of tower passes
that share them (tiles of LLaVA-NeXT, frames of Video-LLaVA), so one pass keeps ``dominant / units``. That is exact for
five tiles and eight frames only; the rows with ``per="picture"`` keep the total whatever the number of passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LLAMA = ((16, 0.5), (24, 0.0))
_QWEN = ((14, 0.5), (21, 0.0))


@dataclass(frozen=True)
class Preset:
    """One row of a table: what enters, how it is cut, where it stands in the paper."""

    dominant: int
    contextual: int
    source: str
    schedule: tuple[tuple[int, float], ...] = _LLAMA
    depth: int = 32
    units: int = 1
    per: str = "pass"
    fields: tuple[tuple[str, Any], ...] = ()
    """Further fields of ``DuetConfig``."""

    @property
    def entering(self) -> int:
        """Visual tokens per image or video that enter the language model."""
        return self.dominant + self.contextual


def _qwen(dominant: int, contextual: int, source: str, schedule: tuple = _QWEN, fields: tuple = ()) -> Preset:
    return Preset(dominant, contextual, source, schedule=schedule, depth=28, fields=fields)


_RELEASE_QWEN = ((14, 0.5), (21, 0.25))
# But for its counts after the first stage (option "recount"), with which the average would be 460.
_AS_RELEASED = (("variant", "release"), ("queries", "all"), ("options", {"causal": False}))

PRESETS: dict[str, dict[int, Preset]] = {
    "llava-1.5-7b": {
        192: Preset(300, 7, "Table 12"),
        128: Preset(170, 35, "Table 12"),
        64: Preset(72, 30, "Table 12"),
    },
    "llava-next-7b": {
        640: Preset(850, 175, "Table 13", units=5),
        320: Preset(360, 150, "Table 13", units=5),
        160: Preset(225, 30, "Table 13", units=5),
    },
    "video-llava-7b": {
        960: Preset(1280, 256, "Table 14", units=8),
        136: Preset(160, 56, "Table 14 (its true average is 135)", units=8),
    },
    "llava-next-7b-per-picture": {
        640: Preset(850, 175, "Table 13, for any number of tiles", per="picture"),
        320: Preset(360, 150, "Table 13, for any number of tiles", per="picture"),
        160: Preset(225, 30, "Table 13, for any number of tiles", per="picture"),
    },
    "video-llava-7b-per-picture": {
        960: Preset(1280, 256, "Table 14, for any number of frames", per="picture"),
        136: Preset(162, 56, "derived from Table 14, for any number of frames (average 136.25)", per="picture"),
    },
    # Table 15 contradicts its own caption: no single ratio list gives 640, 320 and 160. These rows are the consistent
    # ones for the 85:15 split and {14: 0.5, 21: 0}.
    "qwen2.5-vl-7b": {
        640: _qwen(870, 154, "derived from Table 15"),
        320: _qwen(435, 77, "derived from Table 15"),
        160: _qwen(218, 38, "derived from Table 15"),
    },
    "qwen2.5-vl-7b-table15": {
        640: _qwen(870, 153, "Table 15 as printed (average 639.25)"),
        320: _qwen(517, 91, "Table 15 as printed (average 380)"),
        160: _qwen(207, 36, "Table 15 as printed (average 151.75)"),
    },
    "qwen2.5-vl-7b-release": {
        640: _qwen(540, 100, "released evaluation script (average 440)", _RELEASE_QWEN, _AS_RELEASED),
    },
}
PRESETS["llava-1.5-13b"] = PRESETS["llava-1.5-7b"]
PRESETS["llava-next-13b"] = PRESETS["llava-next-7b"]
PRESETS["llava-next-13b-per-picture"] = PRESETS["llava-next-7b-per-picture"]
# A frame of a Qwen model that has no more tokens than a row's total is left whole; shares (dominant=0.65,
# contextual=0.05, the released code's) follow its size instead.
PRESETS["duet-qwen"] = PRESETS["qwen2.5-vl-7b"]
PRESETS["duet-qwen-table15"] = PRESETS["qwen2.5-vl-7b-table15"]
PRESETS["duet-qwen-release"] = PRESETS["qwen2.5-vl-7b-release"]
