"""How near a plan comes to the run: peak memory and time of steps, on a grid of bases, ranks, lengths and ways to fit.

    python benchmarks/plan_accuracy.py [NAME ...]

Each case is a fresh `deltaw train` that plans with a pace of its own, measured then, and trains a few steps. Peak
memory is the kernel's high-water mark of the process; of a streamed base, whose pages can be taken back at any time,
the lowest cgroup limit under which the run finishes within three times its time, to 2 % of the plan. Runs without
options are merged too, and that peak is compared; so is that until the base was open, where it is in memory. Cases by
whose figures no constant of deltaw/plan was chosen are reported apart. Rows go to results/plan_accuracy.jsonl as they
are measured; a case that has its row is not run again. results/plan_accuracy.json holds rows and errors. `--replan`
plans the memory of the rows anew, when its formula changed and what runs do did not; times stay as planned beside the
run.
On a processor that computes in fp32, results are plan_accuracy_fp32.*.
Rows marked "busy" were measured while other work used the machine, and their times do not count.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bases import FOLDER, base
from limits import finishes_under

from deltaw import api, hardware
from deltaw.config import make_settings
from deltaw.engine.run import create_run
from deltaw.engine.train import train
from deltaw.engine.watcher import Watcher

RESULTS = Path(__file__).parent / "results"
BF16 = hardware.compute_dtype(torch.device("cpu"), hardware.look()) == torch.bfloat16
NAME = "plan_accuracy" if BF16 else "plan_accuracy_fp32"
ROWS, SUMMARY = RESULTS / f"{NAME}.jsonl", RESULTS / f"{NAME}.json"
STEPS = 6
BISECTIONS, RANGE = 5, 0.3  # of the prediction, to either side
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


class Case(NamedTuple):
    """One run of the grid, of `tokens` a step. `fitted`: constants may have been chosen by it."""

    base: str
    rank: int
    length: int
    tokens: int
    options: tuple[str, ...] = ()
    fitted: bool = False

    @property
    def name(self) -> str:
        """What its row is found by."""
        return " ".join([self.base.removesuffix("-shape"), f"r{self.rank}", f"{self.length}", *self.options])


CASES = [
    Case("smollm2-135m-shape", 4, 64, 1024, fitted=True),
    Case("smollm2-135m-shape", 16, 256, 1024, fitted=True),
    Case("smollm2-135m-shape", 64, 1024, 2048, fitted=True),
    Case("smollm2-135m-shape", 16, 1024, 2048, ("--recompute", "15"), fitted=True),
    Case("smollm2-135m-shape", 16, 2048, 2048, ("--recompute", "30"), fitted=True),
    Case("smollm2-135m-shape", 16, 256, 1024, ("--quant", "nf4"), fitted=True),
    Case("smollm2-135m-shape", 16, 256, 1024, ("--stream",), fitted=True),
    Case("smollm2-360m-shape", 8, 512, 1024),
    Case("smollm2-360m-shape", 32, 2048, 2048),
    Case("smollm2-360m-shape", 16, 128, 1024, ("--recompute", "16")),
    Case("llama-3.2-1b-shape", 16, 256, 512),
    Case("llama-3.2-1b-shape", 16, 512, 512, ("--quant", "int8")),
    Case("smollm2-1.7b-shape", 8, 256, 512),
    Case("smollm2-1.7b-shape", 16, 256, 512, ("--stream",)),
    Case("qwen3-0.6b-shape", 16, 64, 1024, fitted=True),
    Case("qwen3-0.6b-shape", 16, 1024, 1024, fitted=True),
    Case("qwen3-0.6b-shape", 4, 256, 1024, ("--recompute", "28")),
    Case("qwen3-0.6b-shape", 64, 256, 1024, ("--quant", "nf4")),
    Case("qwen3-0.6b-shape", 16, 256, 512, ("--stream",), fitted=True),
    Case("qwen3-1.7b-shape", 16, 128, 512, ("--quant", "nf4", "--stream")),
    Case("gemma-3-270m-shape", 16, 256, 1024, fitted=True),
    Case("gemma-3-270m-shape", 4, 2048, 2048, fitted=True),
    Case("gemma-3-1b-shape", 16, 512, 512, fitted=True),
    Case("gemma-3-1b-shape", 32, 64, 512, ("--recompute", "13")),
    Case("pythia-160m-shape", 16, 256, 1024, fitted=True),
    Case("pythia-160m-shape", 64, 1024, 1024, fitted=True),
    Case("pythia-160m-shape", 4, 64, 1024, ("--recompute", "6"), fitted=True),
    Case("pythia-410m-shape", 16, 512, 1024),
    Case("pythia-410m-shape", 16, 128, 1024, ("--recompute", "24")),
    Case("pythia-1.4b-shape", 8, 256, 512),
]


SHOWN = {  # in the guide
    "smollm2-135m r16 256": "135M, 16, 256, in memory",
    "smollm2-135m r16 256 --stream": "135M, 16, 256, streamed",
    "pythia-410m r16 512": "410M (modules), 16, 512, in memory",
    "pythia-410m r16 128 --recompute 24": "410M (modules), 16, 128, every block computed twice",
    "smollm2-1.7b r8 256": "1.7B, 8, 256, in memory",
    "smollm2-1.7b r16 256 --stream": "1.7B, 16, 256, streamed",
}


def main(names: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    if names == ["--replan"]:
        names, rows = ["no case is measured"], [replan(row) for row in rows]
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {row["name"] for row in rows}
    for case in CASES:
        if case.name in known or (names and not any(name in case.name for name in names)):
            continue
        rows.append(measure(case))
        with ROWS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    found = {"errors": errors(rows), "rows": rows}
    SUMMARY.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["errors"], indent=1), sentence(found["errors"]["all"]), sep="\n")
    if SHOWN.keys() <= {row["name"] for row in rows}:
        print(table(rows))


def measure(case: Case) -> dict[str, Any]:
    """The row of one case."""
    folder, cache = base(case.base), FOLDER / "cache"
    shutil.rmtree(cache / "pace", ignore_errors=True)  # a pace of its own, and the heaviest step is taken in each run
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "chats.jsonl"
        write_chats(data, case)
        summary, plan, seconds = _train(case, folder, data, cache, Path(work) / "run")
        found = summary["peak_bytes"]
        merged = {} if case.options else _merged(plan, Path(work) / "run", Path(work) / "merged", cache)
        if "--stream" in case.options:
            found = _lowest_limit(case, folder, data, cache, Path(work), plan["peak_bytes"], summary["train_seconds"])
    return {
        "name": case.name,
        "case": case._asdict(),
        "peak_bytes": found,
        **_planned(plan, found),
        "high_water_bytes": summary["peak_bytes"],
        "opened_bytes": summary["opened_bytes"],
        **merged,
        "step_seconds": seconds,
        "planned_step_seconds": plan["step_seconds"],
        "time_error": plan["step_seconds"] / seconds - 1,
        "planned_way": plan["way"],
        "way": summary["way"],
        "gemm_gflops": summary["gemm_gflops"],
        "cpu": summary["machine"]["cpu_name"],
    }


def _planned(plan: dict[str, Any], found: int) -> dict[str, Any]:
    return {
        "peak_is": plan["peak_is"],
        "planned_peak_bytes": plan["peak_bytes"],
        "peak_error": plan["peak_bytes"] / found - 1,
        "planned_phases": {phase: sum(parts.values()) for phase, parts in plan["phases"].items()},
        "peak_phase": plan["peak_phase"],
        "planned_parts": plan["phases"][plan["peak_phase"]],
    }


def replan(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what is planned for its memory now."""
    case = next(case for case in CASES if case.name == row["name"])
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "chats.jsonl"
        write_chats(data, case)
        given = _options(case, base(case.base), data, Path(work) / "run")
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        command = [sys.executable, "-m", "deltaw", "plan", *flags, *case.options, "--json"]
        environment = {**os.environ, "DELTAW_CACHE": str(FOLDER / "cache")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    merging = {"planned_merging_bytes": sum(plan["merging"].values())} if "merging_bytes" in row else {}
    return {**row, **_planned(plan, row["peak_bytes"]), **merging}


def _options(case: Case, folder: Path, data: Path, run: Path) -> dict[str, str]:
    given = {
        "model": folder, "data": data, "out": run, "rank": case.rank, "steps": STEPS, "batch_tokens": case.tokens,
        "micro_tokens": case.tokens, "max_length": max(case.length, 64), "eval_rows": 8, "eval_steps": STEPS,
        "checkpoint_steps": STEPS,
    }  # fmt: skip
    return {name: str(value) for name, value in given.items()}


def _train(case: Case, folder: Path, data: Path, cache: Path, run: Path) -> tuple[Any, Any, float]:
    """(summary, plan, median seconds of the steps after the first)."""
    shutil.rmtree(cache / "probes", ignore_errors=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in _options(case, folder, data, run).items()]
    command = [sys.executable, "-m", "deltaw", "train", *flags, *case.options, "--json"]
    done = subprocess.run(command, env={**os.environ, "DELTAW_CACHE": str(cache)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median([line["seconds"] for line in lines if "seconds" in line][1:])
    return json.loads(done.stdout), json.loads((run / "plan.json").read_text()), seconds


def _merged(plan: dict[str, Any], run: Path, out: Path, cache: Path) -> dict[str, int]:
    """What `deltaw merge` of the run holds at its peak, and was said to hold. The folder is removed again."""
    command = [sys.executable, __file__, "--merge", str(run), str(out)]
    environment = {**os.environ, "DELTAW_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    return {"merging_bytes": int(done.stdout), "planned_merging_bytes": sum(plan["merging"].values())}


def _lowest_limit(case: Case, folder: Path, data: Path, cache: Path, work: Path, planned: int, seconds: float) -> int:
    """By bisection, of runs without a plan, which would fit itself into each limit in another way, or refuse it."""
    files = [*folder.glob("*.safetensors"), *(cache / "quantised").rglob("*.safetensors")]

    def finishes(limit: float) -> bool:
        shutil.rmtree(work / "child", ignore_errors=True)
        given = {**_options(case, folder, data, work / "child"), "stream": True, "data": [str(data)]}
        given |= {"quant": case.options[case.options.index("--quant") + 1]} if "--quant" in case.options else {}
        child = ["env", f"DELTAW_CACHE={cache}", sys.executable, __file__, "--child", json.dumps(given)]
        return finishes_under(int(limit), child, files, 3 * seconds + 60)

    low, high = planned * (1 - RANGE), planned * (1 + RANGE)
    while finishes(low):
        low, high = low * (1 - RANGE), low
    while not finishes(high):
        low, high = high, high * (1 + RANGE)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if finishes(middle) else (middle, high)
    return round(high)


def child(given: dict[str, Any]) -> None:
    """Trains these settings as they are."""
    settings = make_settings(given)
    train(create_run(settings), settings, Watcher())


def merge(run: Path, out: Path) -> None:
    """Merges a run and prints this process's high-water mark."""
    api.merge(run, out)
    print(hardware.peak_rss_bytes())


def write_chats(path: Path, case: Case) -> None:
    """Chats of about the length, between a half and all of it; a third of each is the answer."""
    words = random.Random(case.name)
    lines, left = [], (STEPS + 4) * case.tokens + 40 * case.length
    while left > 0:
        count = max(12, round(case.length * words.uniform(0.5, 1.0)) - 40)
        text = [words.choice(WORDS) for _ in range(count)]
        asked, answered = " ".join(text[: 2 * count // 3]), " ".join(text[2 * count // 3 :])
        roles = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        lines.append(json.dumps({"messages": roles}))
        left -= count + 40
    path.write_text("\n".join(lines) + "\n")


def errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all cases, and apart over those by which something was chosen and those by which nothing was."""
    found = {}
    fitted = [row for row in rows if row["case"]["fitted"]]
    for label, some in (("all", rows), ("fitted", fitted), ("held out", [row for row in rows if row not in fitted])):
        peaks = [abs(row["peak_error"]) for row in some]
        times = [abs(row["time_error"]) for row in some if not row.get("busy")]
        if some:
            found[label] = {
                "runs": len(some),
                "runs_timed": len(times),
                "peak_median": statistics.median(peaks),
                "peak_95th": sorted(peaks)[max(0, -(-95 * len(peaks) // 100) - 1)],
                "peak_most_under": -min(0.0, *(row["peak_error"] for row in some)),
                "peak_most_over": max(row["peak_error"] for row in some),
                "time_median": statistics.median(times),
                "time_most": max(times),
            }
    merged = [row["planned_merging_bytes"] / row["merging_bytes"] - 1 for row in rows if "merging_bytes" in row]
    opened = [
        max(row["planned_phases"][phase] for phase in ("plan", "load")) / row["opened_bytes"] - 1
        for row in rows
        if row["peak_is"] == "high-water mark of the process"
    ]
    for label, some in (("opening", opened), ("merging", merged)):
        if some:
            found[label] = {
                "runs": len(some),
                "peak_median": statistics.median(map(abs, some)),
                "peak_most_under": -min(0.0, *some),
                "peak_most_over": max(some),
            }
    return found


def sentence(found: dict[str, Any]) -> str:
    """What the README says of the errors of all cases."""
    shown = {name: f"{100 * value:.{0 if name.startswith('time') else 1}f} %" for name, value in found.items()}
    return (
        "A plan's memory is {peak_median} off in the median of {runs} runs and {peak_95th} in the 95th percentile, at "
        "most {peak_most_under} too low and {peak_most_over} too high; step times are {time_median} off in the median "
        "and {time_most} at most"
    ).format(**{**shown, "runs": found["runs"]})


def beside(found: dict[str, Any]) -> str:
    """What docs/guides/memory.md says of the plans of opening and of merging."""
    opening, merging = found["opening"], found["merging"]
    return (
        "Opening a base was planned at most {:.1f} % too low and {:.0f} % too high ({} runs), merging {:.1f} and "
        "{:.0f} % ({} runs, by which its constants were chosen)."
    ).format(*(each[key] if key == "runs" else 100 * each[key] for each in (opening, merging)
               for key in ("peak_most_under", "peak_most_over", "runs")))  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """What docs/guides/memory.md shows of the rows."""
    found = {row["name"]: row for row in rows}
    lines = ["| base, rank, tokens of a document | memory | a step |", "|---|---|---|"]
    for name, described in SHOWN.items():
        row = found[name]
        lines.append(f"| {described} | {row['peak_bytes'] / 1e9:.2f} GB | {row['step_seconds']:.2f} s |")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:50} peak {row['peak_bytes'] / 1e6:7,.0f} MB, planned {row['planned_peak_bytes'] / 1e6:7,.0f} "
        f"({row['peak_error']:+.1%})  step {row['step_seconds']:6.2f} s, planned {row['planned_step_seconds']:6.2f} "
        f"({row['time_error']:+.1%})"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["--merge"]:
        merge(*map(Path, sys.argv[2:]))
    else:
        main(sys.argv[1:])
