"""The table in docs/reliability.md is the one that benchmarks/incumbent.py makes of its own figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_beside_the_incumbent_is_that_of_the_measured_figures():
    spec = importlib.util.spec_from_file_location("incumbent", ROOT / "benchmarks" / "incumbent.py")
    assert spec is not None and spec.loader is not None
    incumbent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(incumbent)
    rows = json.loads(incumbent.RESULTS.read_text())["rows"]
    assert rows.keys() == incumbent.ROWS.keys()
    assert incumbent.table(rows) in (ROOT / "docs" / "reliability.md").read_text(), "paste what the script prints"
