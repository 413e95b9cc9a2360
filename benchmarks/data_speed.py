"""How long 100,000 short chats take to be read, rendered, tokenised, masked and checked, and how long a second start.

The chats are the demo's 8,000 training texts, each as often as needed, numbered so that all differ. Two processes of
`deltaw data check --json` are timed as a whole, start-up included; then a set of 1,000,000 rows says whether memory
grows with it. Writes benchmarks/results/data_speed.json. Usage: python benchmarks/data_speed.py [ROWS ...]
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from deltaw.base.builtin import base_path, cache_folder
from deltaw.hardware import look

RESULTS = Path(__file__).parent / "results" / "data_speed.json"
# Runs a command and prints its exit code, seconds and peak bytes: a parent's own children have one high-water mark.
MEASURE = (
    "import json, resource, subprocess, sys, time\n"
    "started = time.monotonic()\n"
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE)\n"
    "peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
    "page = json.loads(done.stdout)\n"
    "print(json.dumps({'seconds': time.monotonic() - started, 'peak_bytes': peak, 'exit': done.returncode,"
    " 'used': page['used'], 'tokens': page['statistics']['tokens'], 'findings': len(page['findings'])}))"
)


def main(sizes: list[int]) -> None:
    base_path("smollm2-135m")
    rows = [measure(size) for size in sizes]
    machine = {"cpu_name": look().cpu_name, "cores": look().cores}
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    for row in rows:
        cold, second = row["cold"], row["second"]
        print(
            f"{row['rows']:>9,} rows: {cold['seconds']:.1f} s, a second start {second['seconds']:.2f} s, "
            f"peak {cold['peak_bytes'] / 1e6:.0f} MB"
        )
    print(json.dumps({str(row["rows"]): [row["cold"]["seconds"], row["second"]["seconds"]] for row in rows}))


def measure(rows: int) -> dict[str, Any]:
    """One row of the result: a cold start and a second one in a cache that holds the base and no tokens."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        for entry in cache_folder().glob("smollm2-135m-v*"):
            (cache / entry.name).symlink_to(entry)
        data = Path(folder) / "chats.jsonl"
        write_chats(data, rows)
        check = [sys.executable, "-m", "deltaw", "data", "check", str(data), "--json", "--quiet"]
        environment = {**os.environ, "DELTAW_CACHE": str(cache)}
        found: dict[str, Any] = {"rows": rows, "file_bytes": data.stat().st_size}
        for name in ("cold", "second"):
            command = [sys.executable, "-c", MEASURE, *check]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found[name] = json.loads(done.stdout)
            assert found[name]["used"] == rows and found[name]["exit"] == 0, found
        return found


def write_chats(path: Path, rows: int) -> None:
    source = resources.files("deltaw") / "data" / "snippets" / "train.jsonl.gz"
    with gzip.open(str(source), "rt", encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file]
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            question, answer = chats[number % len(chats)]
            asked = {**question, "content": f"{number}. {question['content']}"}
            out.write(json.dumps({"messages": [asked, answer]}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [100_000, 1_000_000])
