"""Find bad records before the first step, rather than hours into a run."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava.train.images import find_image, probe_image
from llava.train.records import (
    UNLABELLED,
    BadRecord,
    BadSampleError,
    Origin,
    as_bad_sample,
    check_record,
    images_of,
)

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What a scan found.

    Attributes:
        records: Number of records that were looked at.
        images: Number of different pictures that were looked at.
        bad: The bad records, in file order.
        positions: For every bad record its place in the list that was scanned.
        unlabelled: How many records have nothing to learn from; an estimate where only some were tokenised.
    """

    records: int = 0
    images: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    unlabelled: int = 0

    @property
    def ok(self) -> bool:
        """Whether every record is good."""
        return not self.bad

    @property
    def counts(self) -> dict[str, int]:
        """Number of bad records by kind, most frequent first."""
        return dict(Counter(record.kind for record in self.bad).most_common())

    def summary(self, limit: int = 10) -> str:
        """A few lines for the terminal: totals, counts by kind, the first bad records."""
        head = f"{self.records} records and {self.images} images checked, {len(self.bad)} bad"
        kinds = [f"  {count} x {kind}" for kind, count in self.counts.items()]
        shown = [f"  {record}" for record in self.bad[:limit]]
        more = [f"  ... and {len(self.bad) - limit} more"] if len(self.bad) > limit else []
        return "\n".join([head, *kinds, *shown, *more])

    def write(self, path: str | os.PathLike) -> None:
        """Write the bad records as JSON lines: file, index, id, kind, reason."""
        lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self.bad]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

    def raise_if_bad(self) -> None:
        """Raise ``BadSampleError`` with the summary when a record is bad."""
        if self.bad:
            raise BadSampleError(
                f"{self.summary()}\nFix these records, or leave them out with --on_bad_sample skip", "bad records"
            )


def scan(
    records: Sequence[Any],
    image_folder: str | os.PathLike | None = None,
    *,
    origins: Sequence[Origin] | None = None,
    multimodal: bool = True,
    images: bool = True,
    decode: bool = False,
    workers: int = 8,
    extra_check: Callable[[Any], None] | None = None,
    videos: bool = False,
    max_aspect_ratio: float | None = None,
) -> Report:
    """Check every record: types, roles, answers, image marks, and the pictures.

    Args:
        records: What the annotation files hold.
        image_folder: Folder that picture names start from.
        origins: Where each record was read; None counts places in ``records``.
        multimodal: False for a run without a vision tower: marks and pictures are not looked at.
        images: Whether pictures are opened.
        decode: Read every pixel (finds truncated files) instead of the headers only.
        workers: Threads that open pictures.
        extra_check: Further check of a record that is good so far. Whatever it raises makes the record a bad one.
        videos: Whether the model takes videos; their files are the business of ``extra_check``.
        max_aspect_ratio: Longer to shorter side from which on a picture is refused; None for no limit.

    Returns:
        The report. Each picture is opened once, however many records use it.
    """
    problems: dict[int, BadSampleError] = {}
    users: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        try:
            check_record(record, multimodal, videos)
            if extra_check is not None:
                extra_check(record)
        except Exception as error:
            problems[position] = as_bad_sample(error)
            continue
        for name in images_of(record) if multimodal and images else []:
            users.setdefault(name, []).append(position)

    def check_picture(name: str) -> BadSampleError | None:
        try:
            probe_image(find_image(image_folder, name), decode, max_aspect_ratio)
        except Exception as error:
            return as_bad_sample(error)
        return None

    if users:
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            for name, error in zip(users, pool.map(check_picture, users), strict=True):
                if error is not None:
                    for position in users[name]:
                        problems.setdefault(position, error)
    positions = sorted(problems)
    places = origins or [Origin("records", position) for position in range(len(records))]
    bad = [problems[position].at(places[position], records[position]) for position in positions]
    unlabelled = sum(one.kind in UNLABELLED for one in bad)
    return Report(records=len(records), images=len(users), bad=bad, positions=positions, unlabelled=unlabelled)
