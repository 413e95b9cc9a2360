"""The demo's accuracy at half, once and twice the default learning rate, and over a base in 4 and 8 bits.

Is the default rate right, and what does quantising cost? Runs `deltaw demo --json` once per case in a fresh process and
writes benchmarks/results/demo_accuracy.json, a row per finished run; a case that has its row already is not run again.
Usage: python benchmarks/demo_accuracy.py [FACTOR[:QUANT] ...], as in 1 0.5 1:nf4
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.config import default_rate

RESULTS = Path(__file__).parent / "results" / "demo_accuracy.json"
HIDDEN = 576  # of SmolLM2-135M
CASES = ("1", "0.5", "2", "1:nf4", "1:int8")


def main(cases: Sequence[str]) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for case in cases:
        factor, _, quant = case.partition(":")
        key = (float(factor), quant or "none")
        if all((row["rate_factor"], row["quant"]) != key for row in rows):
            rows.append(measure(*key))
            rows.sort(key=lambda row: (row["quant"] != "none", row["quant"], row["rate_factor"]))
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """What docs/guides/rank-and-rate.md shows of the rows."""
    lines = [
        "| rate | base in | base | adapter, test accuracy (95 % interval) | validation loss |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        base, adapter = row["base"]["accuracy"], row["adapter"]
        accuracy = f"{100 * adapter['accuracy']:.1f} % ({100 * adapter['low']:.1f} – {100 * adapter['high']:.1f})"
        held = row["dtype"] if row["quant"] == "none" else row["quant"]
        rate = f"{row['rate']:.3g} ({row['rate_factor']:g}×)"
        lines.append(f"| {rate} | {held} | {100 * base:.1f} % | {accuracy} | {row['best_eval_loss']:.3f} |")
    return "\n".join(lines)


def measure(factor: float, quant: str) -> dict[str, Any]:
    """One row: the numbers of a demo at `factor` times the default rate, over a base that is stored like that."""
    rate = default_rate(HIDDEN, "llama")[0] * factor
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deltaw", "demo", "--lr", f"{rate:.4g}", "--quant", quant]
        command += ["--out", f"{folder}/run", "--json"]
        print(" ".join(["deltaw", *command[3:]]), file=sys.stderr)
        summary = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    kept = ("accuracy", "low", "high", "rows", "loss", "exact_match")
    results = {row["label"]: {name: row[name] for name in kept if name in row} for row in summary["results"]}
    names = (
        "steps",
        "tokens",
        "trained_tokens",
        "train_seconds",
        "peak_bytes",
        "best_eval_loss",
        "gemm_gflops",
        "dtype",
    )
    return {
        "command": f"deltaw demo --lr {rate:.4g} --quant {quant}",
        "rate_factor": factor,
        "quant": quant,
        "rate": rate,
        "base": results["base model"],
        "adapter": results["adapter"],
        **{name: summary[name] for name in names},
        "machine": summary["machine"],
        "sizes": summary["sizes"],
        "deltaw_version": summary["origin"]["deltaw_version"],
    }


if __name__ == "__main__":
    main(sys.argv[1:] or CASES)
