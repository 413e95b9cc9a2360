"""Bases larger than the memory that a run may take: does it finish, how fast is that, and how fast could it be?

    python benchmarks/big_base.py [NAME ...]        # as in RUNS; 'demo*' for all that begin so

Each run is a fresh process that plans and trains through `deltaw.train`, in a cgroup of exactly the memory that it is
given as `--memory`, with the base's files dropped from the system's cache before. Four questions:

- "1.7b": 3.4 GB of weights streamed under 1.2 GB, and the same run in memory. How much of its speed is left? The two
  take turns step by step, each with files of its own, so that both meet the same moods of the machine.
- "8b": 16 GB of weights under 4 and 3 GB in bf16. How near are steps to the slower of two bounds, products and disk?
- "8b nf4": the same, stored in 4 bits.
- "1.7b fp32": as "1.7b", computed in fp32 from the same bf16 files: what a processor without bf16 arithmetic does.
- "demo": the demo's training with less and less memory, and its accuracy beside that of a run without a limit.

Products: 2 operations a weight and token forward, 2 more where a block is computed again, 2 for the gradient that goes
through frozen weights; 4 a labelled token and weight of the head; over the rate of a product of such width (2,048 at
most), measured before and after each step, since a shared machine changes its speed from one minute to the next.
Attention, norms and the factors are left out, so nothing can reach this bound. Disk: what the kernel read for this
process during the step, over the rate of reading weights that lie in no cache.

Rows go to results/big_base.json as they are measured; a run that has its row is not run again. Without names, those are
run that compute in the dtype that this machine is fast in.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from bases import FOLDER, TOKENIZER, base
from limits import finishes_under, forget
from plan_accuracy import Case, write_chats

from deltaw import base_path, hardware, training
from deltaw.base.shapes import Outline, outline
from deltaw.config import make_settings
from deltaw.demonstration import demo_settings, snippets
from deltaw.engine.run import create_run, open_run
from deltaw.engine.watcher import Watcher
from deltaw.plan.speed import read_rate

RESULTS = Path(__file__).parent / "results" / "big_base.json"
MB = 1_000_000
PROBES = 5  # of the disk and of the multiply rate
DEMO, DEMO_LIMITS = "demo", (900, 700)


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

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        return torch.float32 if self.options.get("dtype") else torch.bfloat16


FP32 = {"dtype": "float32"}
BLOCKS_TWICE = {"smollm2-1.7b-shape": 24, "llama-3-8b-shape": 32}
RUNS = [  # those of one list take turns
    [
        Setup(name, "smollm2-1.7b-shape", limit, micro=256, steps=7, options={"stream": limit is not None})
        for name, limit in (("1.7b streamed", 1200), ("1.7b in memory", None))
    ],
    *([Setup(f"demo {limit} MB" if limit else "demo", DEMO, limit)] for limit in (None, *DEMO_LIMITS)),
    [
        Setup(name, "smollm2-1.7b-shape", limit, micro=256, steps=5, options={"stream": limit is not None, **FP32})
        for name, limit in (("1.7b fp32 streamed", 2000), ("1.7b fp32 in memory", None))
    ],
    [Setup("8b bf16, 4 GB", "llama-3-8b-shape", 4000, micro=512, options={"quant": "none"})],
    [Setup("8b bf16, 3 GB", "llama-3-8b-shape", 3000, micro=512, options={"quant": "none"})],
    [Setup("8b nf4, 3 GB", "llama-3-8b-shape", 3000, micro=512, options={"quant": "nf4", "stream": True})],
]

SHOWN = {"1.7b streamed", "1.7b in memory", "demo", "demo 900 MB", "8b bf16, 4 GB", "8b nf4, 3 GB"}  # in the guide


def main(names: list[str]) -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    known = {row["name"] for row in rows}
    for setups in RUNS:
        wanted = any(fnmatch(setup.name, name) for name in names for setup in setups) or (
            not names and setups[0].dtype == hardware.compute_dtype(torch.device("cpu"), hardware.look())
        )
        if not wanted or known.issuperset(setup.name for setup in setups):
            continue
        for row in measure(setups):
            rows.append(row)
            print(_line(row), file=sys.stderr, flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(_line(row) for row in rows))
    found = {row["name"]: row for row in rows}
    print(json.dumps(answers(found), indent=1))
    if found.keys() >= SHOWN and all(found[name]["finished"] for name in SHOWN):
        print(table(found))


def measure(setups: list[Setup]) -> list[dict[str, Any]]:
    """The rows of one run, or of several that take turns; one that does not finish says why."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cache, base_name = FOLDER / "cache-big", setups[0].base
    folder = base_path(TOKENIZER) if base_name == DEMO else base(base_name)
    reads = _median(lambda: read_rate(folder))
    for part in ("pace", "probes"):  # each run measures its own, and takes its heaviest step before it begins
        shutil.rmtree(cache / part, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as work, ThreadPoolExecutor(len(setups)) as pool:
        places = [Path(work) / str(number) for number in range(len(setups))]
        turns = f"{work}/turns" if len(setups) > 1 else None
        runs = [_prepare(*pair, folder, turns is not None) for pair in zip(setups, places, strict=True)]
        os.sync()  # a page that was not written yet cannot be dropped
        reasons = list(pool.map(lambda setup, given: _train(setup, given, cache, turns), setups, runs))
        shape = outline(folder)
        return [_row(*run, reads, shape) for run in zip(setups, places, reasons, strict=True)]


def _prepare(setup: Setup, work: Path, folder: Path, alone: bool) -> dict[str, Any]:
    """The settings of a run, in a folder of its own; with a base of its own where pages of others would help it."""
    work.mkdir()
    if alone:
        folder = Path(shutil.copytree(folder, work / "base"))
    given = {**(_demo_settings() if setup.base == DEMO else _settings(setup, work)), "model": str(folder)}
    return given | {
        "out": f"{work}/run", "memory": f"{setup.limit_mb}MB" if setup.limit_mb else None, **setup.options
    }  # fmt: skip


def _row(setup: Setup, work: Path, reason: str | None, reads: float, shape: Outline) -> dict[str, Any]:
    row = {"name": setup.name, "setup": {**setup._asdict(), "options": dict(setup.options)}}
    row["read_gb_per_s"] = reads / 1e9
    if reason is not None:
        return {**row, "finished": False, "reason": reason}
    row |= {"finished": True, **_found(work / "run", shape, reads)}
    return {**row, **_accuracy(work / "run")} if setup.base == DEMO else row


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


def _train(setup: Setup, given: dict[str, Any], cache: Path, turns: str | None) -> str | None:
    """Why the run did not finish; None when it did."""
    asked = {"given": given, "turns": turns, "micro": setup.micro, "dtype": str(setup.dtype).removeprefix("torch.")}
    files = [*Path(given["model"]).glob("*.safetensors")]
    child = ["env", f"DELTAW_CACHE={cache}", sys.executable, __file__, "--child", json.dumps(asked)]
    if setup.limit_mb is None:
        forget(files)
        subprocess.run(child, check=True, stdout=subprocess.DEVNULL)
        return None
    try:
        finished = finishes_under(setup.limit_mb * MB, child, files, 3600)
    except RuntimeError as error:  # refused
        return "\n".join(str(error).splitlines()[-5:])
    return None if finished else "killed, or not done in an hour"


class Turns:
    """Lets one process at a time work, in turn: a lock on a file."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_CREAT | os.O_WRONLY)  # closed when the process ends, which ends its turn

    def take(self) -> None:
        """Waits until it is this process's turn."""
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def pass_on(self) -> None:
        """Lets another one work, if there is one, and waits for the next turn."""
        fcntl.flock(self.file, fcntl.LOCK_UN)
        time.sleep(0.5)
        self.take()


class Recorder(Watcher):
    """Remembers of each step how long it took, what the kernel read for it, and how fast the machine multiplied."""

    def __init__(
        self, product: tuple[int, int, int], dtype: torch.dtype, turns: Turns | None, steps: int | None
    ) -> None:
        self.product, self.dtype, self.turns, self.steps = product, dtype, turns, steps
        self.seconds, self.read, self.multiplies, self.quantised = [], [], [], []

    def say(self, text: str) -> None:
        if text.startswith("Quantising"):
            self.quantised.append(time.monotonic())

    def start(self, _trainer: Any) -> None:
        self.look()

    def step(self, *_: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)
        self.read[-1] = _bytes_read() - self.read[-1]
        self.multiplies[-1] = (self.multiplies[-1] + self.rate()) / 2
        if self.steps is None or len(self.seconds) < self.steps:  # the last step's turn goes on to the end of the run
            self.look()

    def look(self) -> None:
        if self.turns is not None:
            self.turns.pass_on()
        self.multiplies.append(self.rate())
        self.read.append(_bytes_read())
        self.began = time.monotonic()

    def rate(self) -> float:
        return 1e9 * hardware.measure_gemm(self.dtype, *self.product, seconds=0.2)


def child(given: dict[str, Any], turns: str | None, micro: int, dtype: str) -> None:
    """Trains these settings, and leaves beside the run's own records what was seen of its steps."""
    settings, shape = make_settings(given), outline(Path(given["model"]))
    product, shared = (micro, min(2048, shape.hidden), 2048), Turns(turns) if turns else None
    watcher = Recorder(product, getattr(torch, dtype), shared, given.get("steps"))
    if watcher.turns is not None:
        watcher.turns.take()
    run = create_run(settings)
    training.train(settings, run, watcher)
    seconds = None
    if len(times := watcher.quantised) > 1:  # each block says when it begins
        seconds = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    seen = zip(watcher.seconds, watcher.read, watcher.multiplies, strict=False)
    steps = [dict(zip(("seconds", "read", "multiplies"), numbers, strict=True)) for numbers in seen]
    (run.folder / "watched.json").write_text(json.dumps({"steps": steps, "quantise_seconds": seconds}))


def _bytes_read() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def _found(folder: Path, shape: Outline, reads: float) -> dict[str, Any]:
    """What a finished run took, and how near it came to its bounds. Medians are of the steps after the first."""
    run = open_run(folder)
    summary, plan = run.read_summary(), run.read_plan()
    watched = json.loads((folder / "watched.json").read_text())
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    again = plan["choice"]["recompute"] / shape.layers
    for step, seen in zip(steps, watched["steps"], strict=True):
        operations = (4 + 2 * again) * shape.product_parameters * step["computed_tokens"]
        operations += 4 * step["trained_tokens"] * shape.head_shape[0] * shape.head_shape[1]
        step |= {**seen, "products": operations / seen["multiplies"], "disk": seen["read"] / reads}
        step["product_share"] = step["products"] / step["seconds"]
        step["share"] = max(step["products"], step["disk"]) / step["seconds"]
    median = {
        name: statistics.median(step[name] for step in steps[1:])
        for name in ("seconds", "products", "product_share", "multiplies", "disk", "read", "share", "computed_tokens")
    }
    return {
        "choice": plan["choice"],
        "planned_way": plan["way"],
        "way": summary["way"],
        "planned_peak_bytes": plan["peak_bytes"],
        "peak_bytes": summary["peak_bytes"],
        "steps": summary["steps"],
        "step_tokens": median["computed_tokens"],
        "step_seconds": median["seconds"],
        "all_step_seconds": [step["seconds"] for step in steps],
        "gemm_gflops": median["multiplies"] / 1e9,
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
    for kind in ("1.7b", "1.7b fp32"):
        pair = [rows.get(f"{kind} {how}") for how in ("in memory", "streamed")]
        if all(row and row["finished"] for row in pair):
            memory, streamed = (row["all_step_seconds"][1:] for row in pair)
            ratios = [one / other for one, other in zip(memory, streamed, strict=True)]
            found[f"{kind} speed kept"] = {"median": statistics.median(ratios), "pairs": ratios}
    for name, row in rows.items():
        if name.startswith("8b") and row["finished"]:
            found[f"{name}: share of the slower bound"] = row["share_of_slower_bound"]
    demos = [row["setup"]["limit_mb"] for row in rows.values() if row["setup"]["base"] == DEMO and row["finished"]]
    if limits := [limit for limit in demos if limit]:
        found["demo: lowest limit in MB"] = min(limits)
    return found


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """What docs/guides/memory.md shows of the rows."""
    ratios = answers(dict(rows))["1.7b speed kept"]
    memory, demo, small = rows["1.7b in memory"], rows["demo"], rows["demo 900 MB"]
    big, quantised = rows["8b bf16, 4 GB"], rows["8b nf4, 3 GB"]
    share = f"{big['product_seconds']:.0f} s of products at the rate measured then: {big['share_of_slower_bound']:.0%}"
    besides = {
        "1.7b streamed": f"{ratios['median']:.2f} of the speed in memory ({memory['peak_bytes'] / 1e9:.1f} GB), "
        f"step by step in turns: {min(ratios['pairs']):.2f} to {max(ratios['pairs']):.2f}",
        "8b bf16, 4 GB": f"{share} of the slower bound",
        "8b nf4, 3 GB": f"{quantised['quantise_seconds']:.0f} s to quantise, once",
        "demo 900 MB": f"{demo['step_seconds']:.1f} s and {demo['peak_bytes'] / 1e9:.1f} GB without a limit; accuracy "
        f"{small['test']['accuracy']:.1%} and {demo['test']['accuracy']:.1%}",
    }
    lines = ["| run | limit | a step | beside |", "|---|---|---|---|"]
    for name, beside in besides.items():
        limit = f"{rows[name]['setup']['limit_mb'] / 1000:g} GB"
        lines.append(f"| {name.split(',')[0]} | {limit} | {rows[name]['step_seconds']:.1f} s | {beside} |")
    rates = [rows[name]["gemm_gflops"] for name in SHOWN]
    lines += ["", f"The machine multiplied at {min(rates):.0f} to {max(rates):.0f} GFLOP/s."]
    if "1.7b fp32 speed kept" not in (found := answers(dict(rows))):
        return "\n".join(lines)
    kept, memory, streamed = found["1.7b fp32 speed kept"], rows["1.7b fp32 in memory"], rows["1.7b fp32 streamed"]
    text = (
        f"Without bf16 arithmetic ({streamed['gemm_gflops']:.0f} GFLOP/s in fp32), from the same bf16 files: 1.7b "
        f"streamed in {streamed['setup']['limit_mb'] / 1000:g} GB takes {streamed['step_seconds']:.1f} s a step, "
        f"{kept['median']:.2f} of the speed in memory ({memory['peak_bytes'] / 1e9:.1f} GB), in turns "
        f"{min(kept['pairs']):.2f} to {max(kept['pairs']):.2f}."
    )
    return "\n".join([*lines, "", textwrap.fill(text, 120)])


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
        child(**json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
