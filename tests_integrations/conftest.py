"""The suite of the peers' own packages; what it shares with tests/ is the tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
