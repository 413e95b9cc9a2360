"""The demo's accuracy at half, once and twice the default learning rate: is the default rate right?

Runs `deltaw demo --json` once per rate in a fresh process and writes benchmarks/results/demo_accuracy.json, a row per
finished run; a rate that has its row already is not run again. Usage: python benchmarks/demo_accuracy.py [FACTOR ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from deltaw.config import default_rate

RESULTS = Path(__file__).parent / "results" / "demo_accuracy.json"
HIDDEN = 576  # of SmolLM2-135M


def main(factors: list[float]) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for factor in factors:
        if all(row["rate_factor"] != factor for row in rows):
            rows.append(measure(factor))
            rows.sort(key=lambda row: row["rate_factor"])
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{'rate':>10} {'base':>7} {'adapter':>8} {'95 % interval':>16} {'val. loss':>10} {'minutes':>8}")
    for row in rows:
        interval = f"{row['adapter']['low']:.3f} – {row['adapter']['high']:.3f}"
        print(
            f"{row['rate']:>10.2e} {row['base']['accuracy']:>7.3f} {row['adapter']['accuracy']:>8.3f} {interval:>16} "
            f"{row['best_eval_loss']:>10.4f} {row['train_seconds'] / 60:>8.1f}"
        )
    print(
        json.dumps({"rows": len(rows), "accuracies": {row["rate_factor"]: row["adapter"]["accuracy"] for row in rows}})
    )


def measure(factor: float) -> dict[str, object]:
    """One row: the numbers of a demo at `factor` times the default rate."""
    rate = default_rate(HIDDEN, "llama")[0] * factor
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deltaw", "demo", "--lr", f"{rate:.4g}", "--out", f"{folder}/run", "--json"]
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
        "command": f"deltaw demo --lr {rate:.4g}",
        "rate_factor": factor,
        "rate": rate,
        "base": results["base model"],
        "adapter": results["adapter"],
        **{name: summary[name] for name in names},
        "machine": summary["machine"],
        "sizes": summary["sizes"],
        "deltaw_version": summary["origin"]["deltaw_version"],
    }


if __name__ == "__main__":
    main([float(argument) for argument in sys.argv[1:]] or [1.0, 0.5, 2.0])
