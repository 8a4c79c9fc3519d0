"""The tests of TRL use the small models and processors of the families' tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))
