"""What `make gpu-check` does on a GPU, done by the processor with small models: the script itself works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.mark.long
def test_every_part_of_the_gpu_check_runs_and_every_family_agrees():
    command = [sys.executable, str(SCRIPT), "--tiny", "cpu", "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
    parts = ("families {", "attention {", "shared beginnings {", "a run {", "Llama-")
    reached = [line for line in done.stderr.splitlines() if line.startswith(parts)]
    assert len(reached) == 8 and not any("skipped" in line for line in reached)
