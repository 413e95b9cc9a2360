"""Bases larger than the memory that a run may take: does it finish, how fast is that, and how fast could it be?

    python benchmarks/big_base.py [NAME ...]

Each run is a fresh process that plans and trains through `deltaw.train`, in a cgroup of exactly the memory that it is
given as `--memory`, with the base's files dropped from the system's cache before. Four questions:

- "1.7b": 3.4 GB of weights streamed under 1.2 GB, in turn with the same run in memory. How much of its speed is left?
- "8b": 16 GB of weights under 4 and 3 GB in bf16. How near are steps to the slower of two bounds, products and disk?
- "8b nf4": the same, stored in 4 bits.
- "demo": the demo's training with less and less memory, and its accuracy beside that of a run without a limit.

Products: 2 operations a weight and token forward, 2 more where a block is computed again, 2 for the gradient that goes
through frozen weights; 4 a labelled token and weight of the head; over the rate of a product of such width (2,048 at
most), measured before and after each step, since a shared machine changes its speed from one minute to the next.
Attention, norms and the factors are left out, so nothing can reach this bound. Disk: what the kernel read for this
process during the step, over the rate of reading weights that lie in no cache.

Rows go to results/big_base.json as they are measured; a run that has its row is not run again.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from bases import FOLDER, TOKENIZER, base
from limits import finishes_under, forget
from plan_accuracy import Case, write_chats

from deltaw import api, base_path, hardware
from deltaw.base.shapes import Outline, outline
from deltaw.config import make_settings
from deltaw.demonstration import demo_settings, snippets
from deltaw.engine.run import create_run, open_run
from deltaw.engine.watcher import Watcher
from deltaw.plan.speed import read_rate

RESULTS = Path(__file__).parent / "results" / "big_base.json"
MB = 1_000_000
PROBES = 5  # of the disk and of the multiply rate
DEMO, DEMO_LIMITS = "demo", (900, 800, 700, 600, 500)


class Setup(NamedTuple):
    """One run. `limit_mb` None: in memory."""

    name: str
    base: str
    limit_mb: int | None
    rank: int = 4
    tokens: int = 1024
    micro: int = 344
    steps: int = 4
    options: Mapping[str, Any] = MappingProxyType({})


BLOCKS_TWICE = {"smollm2-1.7b-shape": 24, "llama-3-8b-shape": 32}
SETUPS = [
    *(
        Setup(f"1.7b {how}, {turn}", "smollm2-1.7b-shape", limit, steps=7, options={"stream": limit is not None})
        for turn in ("first", "second")
        for how, limit in (("streamed", 1200), ("in memory", None))
    ),
    *(Setup(f"demo {limit} MB" if limit else "demo", DEMO, limit) for limit in (None, *DEMO_LIMITS)),
    Setup("8b bf16, 4 GB", "llama-3-8b-shape", 4000, micro=512, options={"quant": "none"}),
    Setup("8b bf16, 3 GB", "llama-3-8b-shape", 3000, micro=512, options={"quant": "none"}),
    Setup("8b nf4, 3 GB", "llama-3-8b-shape", 3000, micro=512, options={"quant": "nf4", "stream": True}),
]


def main(names: list[str]) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    known = {row["name"] for row in rows}
    for setup in SETUPS:
        if setup.name in known or (names and not any(name in setup.name for name in names)):
            continue
        rows.append(measure(setup))
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    print("\n".join(_line(row) for row in rows))
    print(json.dumps(answers({row["name"]: row for row in rows}), indent=1))


def measure(setup: Setup) -> dict[str, Any]:
    """The row of one run; one that does not finish says why."""
    demo = setup.base == DEMO
    torch.manual_seed(0)  # random weights of 24 blocks may be too rough in bf16 for the proofs; these pass
    folder = base_path(TOKENIZER) if demo else base(setup.base)
    shape = outline(folder)
    multiplies = _median(lambda: 1e9 * hardware.measure_gemm(torch.bfloat16, setup.micro, shape.hidden, shape.inner))
    reads = _median(lambda: read_rate(folder))
    cache = FOLDER / "cache-big"
    for part in ("pace", "probes"):  # each run measures its own, and takes its heaviest step before it begins
        shutil.rmtree(cache / part, ignore_errors=True)
    row = {
        "name": setup.name,
        "setup": {**setup._asdict(), "options": dict(setup.options)},
        "gemm_gflops": multiplies / 1e9,
        "read_gb_per_s": reads / 1e9,
    }
    with tempfile.TemporaryDirectory() as work:
        given = {**(_demo_settings() if demo else _settings(setup, Path(work))), "model": str(folder)}
        given |= {"out": f"{work}/run", "memory": f"{setup.limit_mb}MB" if setup.limit_mb else None, **setup.options}
        reason = _train(setup, given, cache, [*folder.glob("*.safetensors")])
        if reason is not None:
            return {**row, "finished": False, "reason": reason}
        row |= {"finished": True, **_found(Path(work) / "run", shape, reads)}
        return {**row, **_accuracy(Path(work) / "run")} if demo else row


def _settings(setup: Setup, work: Path) -> dict[str, Any]:
    data = work / "chats.jsonl"
    write_chats(data, Case(setup.base, setup.rank, 256, setup.tokens))
    return {
        "data": [str(data)], "rank": setup.rank, "steps": setup.steps, "batch_tokens": setup.tokens, "max_length": 256,
        "micro_tokens": setup.micro, "recompute": BLOCKS_TWICE[setup.base], "eval_rows": 2, "eval_steps": setup.steps,
        "checkpoint_steps": setup.steps,
    }  # fmt: skip


def _demo_settings() -> dict[str, Any]:
    """What the demo gives by itself; rules decide the rest, as they do there."""
    settings = demo_settings({})
    return {name: getattr(settings, name) for name in settings.sources if name != "model"}


def _train(setup: Setup, given: dict[str, Any], cache: Path, files: list[Path]) -> str | None:
    """Why the run did not finish; None when it did."""
    child = ["env", f"DELTAW_CACHE={cache}", sys.executable, __file__, "--child", json.dumps(given)]
    if setup.limit_mb is None:
        forget(files)
        subprocess.run(child, check=True, stdout=subprocess.DEVNULL)
        return None
    try:
        finished = finishes_under(setup.limit_mb * MB, child, files, 3600)
    except RuntimeError as error:  # refused
        return str(error).splitlines()[-1]
    return None if finished else "killed, or not done in an hour"


class Recorder(Watcher):
    """Remembers around each step what the kernel has read for this process and how fast the machine multiplies."""

    def __init__(self, product: tuple[int, int, int]) -> None:
        self.read, self.quantised, self.multiplies, self.product = [], [], [], product

    def say(self, text: str) -> None:
        if text.startswith("Quantising"):
            self.quantised.append(time.monotonic())

    def start(self, _trainer: Any) -> None:
        self.look()

    def step(self, *_: Any) -> None:
        self.look()

    def look(self) -> None:
        self.multiplies.append(1e9 * hardware.measure_gemm(torch.bfloat16, *self.product))
        self.read.append(_bytes_read())


def child(given: dict[str, Any]) -> None:
    """Trains these settings, and leaves beside the run's own records what the kernel knows."""
    settings, shape = make_settings(given), outline(Path(given["model"]))
    watcher = Recorder((int(given.get("micro_tokens", 344)), min(2048, shape.hidden), 2048))
    run = create_run(settings)
    api.train(settings, run, watcher)
    steps = [after - before for before, after in zip(watcher.read, watcher.read[1:], strict=False)]
    seconds = None
    if len(times := watcher.quantised) > 1:  # each block says when it begins
        seconds = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    rates = [(before + after) / 2 for before, after in zip(watcher.multiplies, watcher.multiplies[1:], strict=False)]
    watched = {"read_bytes": steps, "multiplies": rates, "quantise_seconds": seconds}
    (run.folder / "watched.json").write_text(json.dumps(watched))


def _bytes_read() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def _found(folder: Path, shape: Outline, reads: float) -> dict[str, Any]:
    """What a finished run took, and how near it came to its bounds. Medians are of the steps after the first."""
    run = open_run(folder)
    summary, plan = run.read_summary(), json.loads(run.plan.read_text())
    watched = json.loads((folder / "watched.json").read_text())
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    again = plan["choice"]["recompute"] / shape.layers
    for step, read, rate in zip(steps, watched["read_bytes"], watched["multiplies"], strict=True):
        operations = (4 + 2 * again) * shape.product_parameters * step["computed_tokens"]
        operations += 4 * step["trained_tokens"] * shape.head_shape[0] * shape.head_shape[1]
        step["products"], step["disk"], step["read"] = operations / rate, read / reads, read
        step["product_share"] = step["products"] / step["seconds"]
        step["share"] = max(step["products"], step["disk"]) / step["seconds"]
    median = {
        name: statistics.median(step[name] for step in steps[1:])
        for name in ("seconds", "products", "product_share", "disk", "read", "share", "computed_tokens")
    }
    return {
        "choice": plan["choice"],
        "planned_way": plan["way"],
        "plain_reason": summary["plain_reason"],
        "planned_peak_bytes": plan["peak_bytes"],
        "peak_bytes": summary["peak_bytes"],
        "steps": summary["steps"],
        "step_tokens": median["computed_tokens"],
        "step_seconds": median["seconds"],
        "planned_step_seconds": plan["step_seconds"],
        "product_seconds": median["products"],
        "product_share": median["product_share"],
        "disk_seconds": median["disk"],
        "step_read_bytes": median["read"],
        "share_of_slower_bound": median["share"],
        "train_seconds": summary["train_seconds"],
        "quantise_seconds": watched["quantise_seconds"],
        "best_eval_loss": summary["best_eval_loss"],
    }


def _accuracy(run: Path) -> dict[str, Any]:
    """On the demo's test split, measured without a limit, as the demo does it."""
    command = [sys.executable, "-m", "deltaw", "eval", str(run), "--data", str(snippets("test")), "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {"test": {name: found[name] for name in ("accuracy", "low", "high", "loss", "rows")}}


def _median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(PROBES))


def answers(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the rows say to the questions above, as far as they are there."""
    found: dict[str, Any] = {}
    pairs = [[rows.get(f"1.7b {how}, {turn}") for how in ("in memory", "streamed")] for turn in ("first", "second")]
    if all(row and row["finished"] for pair in pairs for row in pair):
        for what, name in (("by the clock", "step_seconds"), ("in products of the minute", "product_share")):
            ratios = [memory[name] / streamed[name] for memory, streamed in pairs]
            found[f"1.7b speed kept, {what}"] = [1 / r if name == "product_share" else r for r in ratios]
    for name, row in rows.items():
        if name.startswith("8b") and row["finished"]:
            found[f"{name}: share of the slower bound"] = row["share_of_slower_bound"]
    demos = [row["setup"]["limit_mb"] for row in rows.values() if row["setup"]["base"] == DEMO and row["finished"]]
    if limits := [limit for limit in demos if limit]:
        found["demo: lowest limit in MB"] = min(limits)
    return found


def _line(row: dict[str, Any]) -> str:
    if not row["finished"]:
        return f"{row['name']:24} did not finish: {row['reason']}"
    choice = row["choice"]
    ways = [f"{choice['micro_tokens']} tokens a pass", f"{choice['recompute']} blocks twice"]
    ways += ["streamed"] * choice["stream"] + [choice["quant"]] * (choice["quant"] != "none")
    accuracy = f"  accuracy {row['test']['accuracy']:.1%}" if "test" in row else ""
    return (
        f"{row['name']:24} {row['step_seconds']:6.2f} s a step (products {row['product_seconds']:5.2f}, disk "
        f"{row['disk_seconds']:5.2f}, share {row['share_of_slower_bound']:.0%}), run {row['train_seconds']:5.0f} s, "
        f"peak {row['peak_bytes'] / MB:6,.0f} MB; {', '.join(ways)}{accuracy}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
