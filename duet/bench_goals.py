"""What ``duet.bench`` expects of DUET, and whether a run met it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from duet.bench_run import EAGER, paired_ratio
from duet.bench_stage1 import SEQUENCE, growth

GOAL_DECODER = 0.92  # of the speed-up that the FLOPs predict for the decoder's prefill
GOAL_LANGUAGE = 0.85  # the same for the language part, backward included
GOAL_WHOLE = 0.90  # of the predicted speed-up of the whole prefill
GOAL_SAVING = 0.88  # of the time that the FLOPs say a training step saves
GOAL_DECISIONS = 0.015  # of the full prefill, for stage 1 and stage 2 together
GOAL_EAGER, GOAL_EAGER_LONG, GOAL_EAGER_MEMORY = 1.1, 2.0, 0.15
GOAL_GROWTH = 1.1  # power of the number of tokens with which stage 1 may grow
GOAL_KV = 1.001  # of the bytes that the budget predicts
LONG = 4096  # visual tokens from which the stricter goals against eager maps hold


def judge(
    case: Any, full: Any, rows: Sequence[Any], derived: Mapping[str, Mapping[str, float]], several: bool
) -> list[str]:
    """Return one line per goal and configuration of DUET.

    Args:
        case: what was run.
        full: the row of all tokens.
        rows: all rows.
        derived: ``bench_report.derive`` of each row by its name.
        several: whether other cases have other text lengths, so that lines must name theirs.
    """
    label = f"{case.kind} batch {case.batch}" + (f" text {case.text}" if several else "")
    by_name = {row.name: row for row in rows}
    lines = []
    for row in rows:
        if row.name.endswith(EAGER):
            lines += _against_eager(f"{label}, {row.name}", by_name[row.name.removesuffix(EAGER)], row, full, case)
        elif row.name.startswith("duet"):
            lines += _against_full(f"{label}, {row.name}", case, row, full, derived[row.name])
    return lines


def _against_full(label: str, case: Any, row: Any, full: Any, d: Mapping[str, float]) -> list[str]:
    lines = [
        goal(d["memory"] <= 1.0, label, f"peak memory {d['memory']:.1%} of full", "100 % at most"),
        goal(d["step_ratio"] >= 1.0, label, f"{d['step_ratio']:.2f} times as fast as full tokens", "never slower"),
    ]
    if row.kv_bytes is not None:
        share = row.kv_bytes / row.kv_predicted
        lines.append(goal(share <= GOAL_KV, label, f"KV cache {share:.1%} of what the budget says", "100 % at most"))
    if full.tokens_entering >= LONG:  # made for long sequences, with too small widths for the goals below
        return lines
    language = f"language part {d['language_reached']:.1%} of predicted ({d['language_reached_square']:.1%} of square)"
    lines.insert(0, goal(d["language_reached"] >= GOAL_LANGUAGE, label, language, f"{GOAL_LANGUAGE:.0%}"))
    if case.kind == "train":
        saving = f"saves {d['saving_reached']:.1%} of the time that FLOPs predict"
        return [*lines, goal(d["saving_reached"] >= GOAL_SAVING, label, saving, f"{GOAL_SAVING:.0%}")]
    decoder, whole = d["decoder_reached"], d["whole_reached"]
    decisions = f"decisions {d['decisions']:.2%} of the prefill"
    return [
        goal(decoder >= GOAL_DECODER, label, f"decoder {decoder:.1%} of predicted", f"{GOAL_DECODER:.0%}"),
        *lines,
        goal(whole >= GOAL_WHOLE, label, f"whole prefill {whole:.1%} of predicted", f"{GOAL_WHOLE:.0%}"),
        goal(d["decisions"] <= GOAL_DECISIONS, label, decisions, f"{GOAL_DECISIONS:.1%} at most"),
    ]


def _against_eager(label: str, row: Any, eager: Any, full: Any, case: Any) -> list[str]:
    if case.kind != "prefill":
        return []
    long = full.tokens_entering >= LONG
    wanted, ratio = GOAL_EAGER_LONG if long else GOAL_EAGER, paired_ratio(eager, row, ["total"])
    lines = [goal(ratio >= wanted, label, f"{ratio:.2f} times its time without maps", f"{wanted:g} at least")]
    if long:
        share = row.memory.tracked / eager.memory.tracked
        what = f"without maps {share:.1%} of its extra memory"
        lines.append(goal(share <= GOAL_EAGER_MEMORY, label, what, f"{GOAL_EAGER_MEMORY:.0%} at most"))
    return lines


def judge_growth(points: Sequence[Any]) -> list[str]:
    """Return one line for time and for memory of each series of stage 1 alone."""
    lines = []
    for series, powers in growth(points).items():
        for what, power in zip(("time", "memory"), powers, strict=True):
            linear = "1 is linear" if series != SEQUENCE or what == "memory" else "every patch is ranked by every other"
            text = f"{what} grows with the tokens to the power of {power:.2f}"
            lines.append(goal(power <= GOAL_GROWTH, f"stage 1, {series}", text, f"{GOAL_GROWTH} at most; {linear}"))
    return lines


def goal(met: bool, label: str, what: str, wanted: str) -> str:
    """Return a line that says whether a goal was met."""
    return f"- {'met' if met else 'MISSED'}: {label}: {what} (goal {wanted})"
