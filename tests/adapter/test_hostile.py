"""Mutated adapters never crash the reader, run code, hang, or pass for what they are not (tests/fuzz_adapters.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "fuzz_adapters.py"


def test_six_thousand_mutated_adapters_are_refused_or_sound():
    done = subprocess.run([sys.executable, str(SCRIPT), "6000"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] + found["sound"] + found.get("equal", 0) == found["mutated"] == 6000
    assert found["forbidden_events"] == {} and found["slowest_cpu_seconds"] < 1
