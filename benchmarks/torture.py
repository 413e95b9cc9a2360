"""The long form of the reliability tests: 2,000 kills and the like. Writes benchmarks/results/torture.json.

Each kind runs in a process of its own (tests/torture.py), its counts as below; about twenty minutes on two cores.
Usage: python benchmarks/torture.py [KIND ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COUNTS = {"kills": 2000, "ways": 400, "flips": 5000, "faults": 1000, "cuts": 1000, "signals": 200, "nans": 400}
ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "torture.json"


def main(kinds: list[str]) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for kind in kinds:
        command = [sys.executable, str(ROOT / "tests" / "torture.py"), kind, str(COUNTS[kind]), "1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        known[kind] = json.loads(done.stdout.splitlines()[-1])
        RESULTS.write_text(json.dumps(known, indent=2) + "\n")
        print(kind, known[kind])
    print(
        json.dumps(
            {kind: found.get("identical", found.get("found", found.get("stopped"))) for kind, found in known.items()}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:] or list(COUNTS))
