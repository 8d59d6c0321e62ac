"""The simulated disk and the histories on it are shared with scripts/simulate_jobs.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
