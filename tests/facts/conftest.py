"""Lets the tests of this folder write `from fact import fact`, whatever pytest's import mode is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
