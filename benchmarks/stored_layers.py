"""What it costs and saves to keep layers in bf16 where they are computed in fp32, beside the same base cast whole.

SmolLM2-135M from its bf16 files ("kept"), and from a copy of them that transformers cast to fp32 ("cast"): steps of the
workloads of passes.py and answers written token by token, in turn within one process; and the high-water mark of a
process that opens it. That both compute the same bits is shown by tests/base/test_stream.py. Writes
benchmarks/results/stored_layers.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from passes import WORKLOADS, batch_of, stepping

from deltaw import base_path, hardware
from deltaw.base.load import Base, load, open_model
from deltaw.engine.generate import continuation

RESULT = Path(__file__).parent / "results" / "stored_layers.json"
BASE = "smollm2-135m"
ROUNDS, TOKENS = 5, 48
PROMPT = "The history of the city of Paris begins"
OPEN = (
    "import sys\nfrom deltaw.base.load import load\nfrom deltaw.hardware import peak_rss_bytes\n"
    "load(sys.argv[1], dtype='float32')\nprint(peak_rss_bytes())"
)


def main() -> None:
    hardware.set_threads(None)
    with tempfile.TemporaryDirectory() as work:
        folders = {"kept": Path(base_path(BASE)), "cast": Path(work)}
        cast(folders["kept"], folders["cast"])
        found = {"opened_bytes": {way: opened_bytes(folder) for way, folder in folders.items()}}
        bases = {way: load(folder, dtype="float32") for way, folder in folders.items()}
        found["step_seconds"] = {name: steps(bases, name) for name in WORKLOADS}
        found["tokens_per_second_written"] = writing(bases)
    machine = {"base": BASE, "cpu": hardware.look().cpu_name, "cores": torch.get_num_threads()}
    RESULT.write_text(json.dumps(machine | found, indent=1) + "\n", "utf-8")
    print(sentence(found))


def cast(stored: Path, out: Path) -> None:
    """The base in `stored` with all of its weights in fp32."""
    open_model(stored, torch.float32).save_pretrained(out)
    for file in stored.iterdir():
        if not (out / file.name).exists() and file.suffix in (".json", ".jinja", ".txt"):
            (out / file.name).write_bytes(file.read_bytes())


def opened_bytes(folder: Path) -> int:
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def steps(bases: dict[str, Base], name: str) -> dict[str, float]:
    """Median seconds of a step by either way."""
    seconds: dict[str, list[float]] = {way: [] for way in bases}
    with ExitStack() as stack:
        taken = {
            way: stack.enter_context(stepping(base, batch_of(base, *WORKLOADS[name])))[0] for way, base in bases.items()
        }
        for number in range(ROUNDS + 1):
            for way, step in taken.items():
                spent = step()
                if number:
                    seconds[way].append(spent)
    return {way: statistics.median(spent) for way, spent in seconds.items()}


def writing(bases: dict[str, Base]) -> dict[str, float]:
    """Median tokens a second of one answer, by either way."""
    rates: dict[str, list[float]] = {way: [] for way in bases}
    for number in range(ROUNDS + 1):
        for way, base in bases.items():
            begun = time.perf_counter()
            answer = continuation(base, base.tokenizer(PROMPT)["input_ids"], TOKENS)
            if number:
                rates[way].append(len(answer) / (time.perf_counter() - begun))
    return {way: statistics.median(found) for way, found in rates.items()}


def sentence(found: dict[str, Any]) -> str:
    """What the guide says."""
    steps = [seconds["kept"] / seconds["cast"] for seconds in found["step_seconds"].values()]
    opened, written = found["opened_bytes"], found["tokens_per_second_written"]
    return (
        f"A step takes {min(steps):.2f} to {max(steps):.2f} times as long as over the same base cast whole, writing an "
        f"answer token by token {written['cast'] / written['kept']:.2f} times, and opening SmolLM2-135M "
        f"{opened['kept'] / 1e6:.0f} MB instead of {opened['cast'] / 1e6:.0f}"
    )


if __name__ == "__main__":
    main()
