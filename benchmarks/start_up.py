"""From process start to the first finished training step of the demo's run, and what the checks before it take.

    python benchmarks/start_up.py [ROUNDS]

Each run is a fresh process that plans, proves and probes as `deltaw train` does: first with nothing cached, then with
tokens, pace and the probe's result there, then without the latter. Beside them, how long `deltaw demo` takes to refuse
a memory that is too small. Writes benchmarks/results/start_up.json, with the machine's multiply rate beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "start_up.json"
CHECKS = ("measure_pace", "prove", "probe")
TOO_SMALL = "100MB"


def run(folder: Path) -> dict[str, float]:
    """Seconds of one fresh process: until its first step was finished, and within each check."""
    environment = {**os.environ, "DELTAW_CACHE": str(folder / "cache")}
    out = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, __file__, "--child", str(Path(out) / "run"), str(time.time())]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(out: str, started: float) -> None:
    """Trains until the first step is finished, in a process that began at `started`, and prints the seconds."""
    from deltaw import planning, training
    from deltaw.base import load
    from deltaw.demonstration import demo_settings
    from deltaw.engine import train

    seconds = dict.fromkeys(CHECKS, 0.0)

    def timed(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                seconds[name] = time.perf_counter() - began

        setattr(module, name, call)

    def first_step(*_: Any) -> bool:
        print(json.dumps({"first_step": time.time() - started, **seconds}), flush=True)
        os._exit(0)

    timed(planning, "measure_pace")
    timed(load, "prove")
    timed(train, "probe")
    train.Trainer.observe = first_step  # type: ignore[method-assign]
    training.train(demo_settings({"out": out, "steps": 2}))


def sentence(found: dict[str, Any]) -> str:
    """What docs/reliability.md says of the figures."""
    medians = found["median_seconds"]
    warm, rest, cold = (medians[kind] for kind in ("all cached", "no probe cached", "nothing cached"))
    return (
        f"{warm['prove']:.1f} s for the proofs on the loaded model, {cold['probe']:.1f} s for the probe, which is "
        "remembered for each combination of base, data, settings and machine and then takes nothing. From the start of "
        f"the process the first step is finished after {warm['first_step']:.1f} s with all cached, "
        f"{rest['first_step']:.1f} s where the probe is not, and {cold['first_step']:.0f} s with nothing, of which "
        f"{cold['measure_pace']:.1f} s time the machine for the plan. A memory that is too small is refused after "
        f"{statistics.median(found['refusal_seconds']):.1f} s"
    )


def refusal(folder: Path) -> float:
    """Seconds of a fresh process until it has refused to train in so little memory."""
    command = [sys.executable, "-m", "deltaw", "demo", "--memory", TOO_SMALL, "--out", str(folder / "refused")]
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "DELTAW_CACHE": str(folder / "cache")}, capture_output=True)
    assert done.returncode == 3, done.stderr.decode()[-3000:]
    return time.perf_counter() - began


def main(rounds: int) -> None:
    import torch

    from deltaw.hardware import measure_gemm, set_threads

    set_threads(None)
    rate = measure_gemm(torch.bfloat16)
    kinds: dict[str, list[dict[str, float]]] = {"nothing cached": [], "all cached": [], "no probe cached": []}
    refused = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kinds["nothing cached"].append(run(folder))
            kinds["all cached"].append(run(folder))
            for probed in (folder / "cache" / "probes").iterdir():
                probed.unlink()
            kinds["no probe cached"].append(run(folder))
            refused.append(refusal(folder))
    medians = {
        kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in kinds.items()
    }
    found = {"bf16_gemm_gflops": rate, "median_seconds": medians, "runs": kinds, "refusal_seconds": refused}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(json.dumps({**medians, "refusal": statistics.median(refused)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], float(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
