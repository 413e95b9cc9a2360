"""Hostile files made by hand end in an error of deltaw's own, soon, small, and without a line of theirs being run.

The artefacts and the process that gives each to its reader are in tests/artefacts.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from artefacts import ADAPTERS, BASES, GGUFS, HARMLESS, HARMLESS_BASES, ROWS, TEMPLATES

SCRIPT = Path(__file__).parent.parent / "artefacts.py"
REFUSED = {"adapter": ADAPTERS, "base": BASES, "template": TEMPLATES, "data": ROWS, "GGUF": GGUFS}
ERRORS = {"adapter": {"AdapterError", "DiskError"}, "base": {"BaseError", "DiskError"}, "template": {"DataError"}, "data": {"DataError"}, "GGUF": {"BaseError"}}  # fmt: skip
EACH_REFUSED = [(kind, name) for kind, artefacts in REFUSED.items() for name in artefacts]
EACH_HARMLESS = [*HARMLESS, *HARMLESS_BASES]
MAX_ADDED_MB = 200


def _seconds(kind: str) -> float:
    return 2 if kind == "template" else 1  # a template may compute for 0.8 s, and is asked twice


@pytest.fixture(scope="module")
def tried() -> dict:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_hundred_and_thirty_five_are_refused_and_fifteen_are_harmless(tried):
    counted = {
        outcome: sum(each["outcome"] == outcome for each in tried.values()) for outcome in ("refused", "accepted")
    }
    assert counted == {"refused": 235, "accepted": 15} and len(tried) == 250


@pytest.mark.parametrize(("kind", "name"), EACH_REFUSED, ids=[name for _, name in EACH_REFUSED])
def test_it_is_refused_within_a_second_and_200_mb_and_runs_nothing(tried, kind, name):
    found = tried[name]
    assert found["outcome"] == "refused" and found["error"] in ERRORS[kind] and found["says"], found
    assert found["cpu_seconds"] < _seconds(kind) and found["added_mb"] < MAX_ADDED_MB, found
    assert found["events"] == [] and not found["canary"], found


@pytest.mark.parametrize("name", EACH_HARMLESS)
def test_it_is_read_as_if_the_hostile_part_were_not_there(tried, name):
    found = tried[name]
    assert found["outcome"] == "accepted" and found.get("same", True), found
    assert found["cpu_seconds"] < 1 and found["added_mb"] < MAX_ADDED_MB, found
    assert found["events"] == [] and not found["canary"], found
