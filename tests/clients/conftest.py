"""What the tests of LLaVA's clients share: helpers of the neighbouring folders, and a chat endpoint on this machine."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "eval"))


@pytest.fixture
def judge(monkeypatch):
    """A running endpoint that the environment names; see `video_stub_judge`."""
    from video_stub_judge import serve_judge

    with serve_judge(monkeypatch) as server:
        yield server
