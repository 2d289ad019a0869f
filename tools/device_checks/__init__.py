"""The sections of tools/gpu_check.py. They need the project's folder, installed or not, and its golden files."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
