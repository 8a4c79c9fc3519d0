"""Small helpers that LLaVA clients import: loggers, printing from one rank, moderation."""

from __future__ import annotations

import json
import logging
import os
import sys
import urllib.error
import urllib.request
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path
from typing import Any

import torch

from llava.constants import LOGDIR

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."

handler: logging.Handler | None = None
"""Always None: LLaVA's one file handler for all loggers; here every logger that `build_logger` makes has its own."""

_LOG_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """Return a logger that writes to the terminal and to a daily rotated file in ``LOGDIR``.

    Unlike LLaVA's function of this name it leaves ``sys.stdout`` and ``sys.stderr`` alone.
    """
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    formatter = logging.Formatter(_LOG_FORMAT, datefmt="%Y-%m-%d %H:%M:%S")
    if not any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
        terminal = logging.StreamHandler()
        terminal.setFormatter(formatter)
        logger.addHandler(terminal)
    path = Path(LOGDIR) / logger_filename
    path.parent.mkdir(parents=True, exist_ok=True)
    open_files = {getattr(handler, "baseFilename", None) for handler in logger.handlers}
    if str(path.resolve()) not in open_files:
        file_handler = TimedRotatingFileHandler(path.resolve(), when="D", utc=True, encoding="utf-8")
        file_handler.setFormatter(formatter)
        logger.addHandler(file_handler)
    return logger


class StreamToLogger:
    """A text stream whose whole lines go to a logger; everything else is the terminal's.

    Args:
        logger: gets the lines, without their ends.
        log_level: of the records.

    Attributes:
        terminal: `sys.stdout` as it was; answers what a stream is asked besides (`isatty`, `encoding`, ...).
        linebuf: the beginning of a line that has not ended.
    """

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO) -> None:
        self.terminal = sys.stdout
        self.logger = logger
        self.log_level = log_level
        self.linebuf = ""

    def __getattr__(self, attr: str) -> Any:
        return getattr(self.terminal, attr)

    def write(self, buf: str) -> int:
        """Log the lines that end in this text; keep the rest. Returns the length of the text, as streams do."""
        *lines, self.linebuf = (self.linebuf + buf).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())
        return len(buf)

    def flush(self) -> None:
        """Log what has been kept."""
        kept, self.linebuf = self.linebuf, ""
        if kept:
            self.logger.log(self.log_level, kept.rstrip())


def process_rank() -> int:
    """Rank of this process among all training processes; 0 when there is only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def rank0_print(*args: object) -> None:
    """Write one line to the terminal, from rank 0 only."""
    if process_rank() == 0:
        sys.stdout.write(" ".join(str(arg) for arg in args) + "\n")
        sys.stdout.flush()


def disable_torch_init() -> None:
    """Do nothing; kept because LLaVA scripts call it.

    It used to replace ``reset_parameters`` of torch's layer classes to load faster. ``transformers`` builds models
    without initialising them since then, and changing torch's classes would reach every other model in the process.
    """
    logging.getLogger(__name__).debug("disable_torch_init has no effect: models load without initialisation")


def violates_moderation(text: str) -> bool:
    """Ask OpenAI's moderation service whether it flags the text; False when it gives no answer.

    Needs the environment variable ``OPENAI_API_KEY``.
    """
    request = urllib.request.Request(
        "https://api.openai.com/v1/moderations",
        data=json.dumps({"input": text.replace("\n", "")}).encode("utf-8"),
        headers={
            "Content-Type": "application/json",
            "Authorization": "Bearer " + os.environ.get("OPENAI_API_KEY", ""),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(json.load(response)["results"][0]["flagged"])
    except (urllib.error.URLError, TimeoutError, ValueError, KeyError, IndexError):
        logging.getLogger(__name__).warning("the moderation service gave no answer; the text is treated as allowed")
        return False


def pretty_print_semaphore(semaphore: object) -> str:
    """Describe an ``asyncio.Semaphore`` for the worker's log."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"  # type: ignore[attr-defined]
