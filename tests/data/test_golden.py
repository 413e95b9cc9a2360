"""Every format and variant gives the token ids and weights that were read and stored (tests/data/golden.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("golden", Path(__file__).parent / "golden.py")
assert _spec is not None and _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
STORED = json.loads(golden.STORED.read_text("utf-8"))


def test_there_are_sixty_cases_and_each_is_stored():
    assert list(STORED) == list(golden.CASES) and len(STORED) >= 60


@pytest.mark.parametrize("name", golden.CASES)
def test_a_row_gives_what_was_stored(name):
    assert golden.outcome(name) == STORED[name]
