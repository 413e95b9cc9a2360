"""Tables in the docs are those that benchmarks make of their own figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_beside_the_incumbent_is_that_of_the_measured_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    incumbent = importlib.import_module("incumbent")
    rows = json.loads(incumbent.RESULTS.read_text())["rows"]
    assert rows.keys() == incumbent.ROWS.keys()
    assert incumbent.table(rows) in (ROOT / "docs" / "reliability.md").read_text(), "paste what the script prints"


def test_the_table_of_bases_larger_than_memory_is_that_of_the_measured_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    big_base = importlib.import_module("big_base")
    rows = {row["name"]: row for row in json.loads(big_base.RESULTS.read_text())}
    assert big_base.table(rows) in (ROOT / "docs" / "guides" / "memory.md").read_text(), "paste what table() gives"
