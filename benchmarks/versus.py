"""deltaw beside PEFT + TRL and Unsloth's CPU path: same base, same tokens, same labels, same start, same optimiser.

    python benchmarks/versus.py              gates, five interleaved rounds per workload, defaults, cold starts (90 min)
    python benchmarks/versus.py --quick      one round, ten seconds each
    python benchmarks/versus.py --verify     the parity gates alone
    python benchmarks/versus.py --sweep      finds each rival's best settings; the long form uses what it stored
    python benchmarks/versus.py --table      table and chart from the stored rows
    python benchmarks/versus.py --only deltaw --workload dense --seconds 20

Every run is a fresh process, and its row is stored as it ends: a benchmark that was stopped goes on where it was. The
rivals' environments and the encoded rows are made once, in .versus/ (--envs). What is measured how: rivals/*.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # this tree's deltaw, whatever is installed

from rivals import chart, environments, gates, settings, summary
from rivals.measure import HERE, ROOT, Bench, OutOfTimeError, Row, launch, tell
from rivals.settings import BASE, WORKLOADS

from deltaw.base.locate import locate
from deltaw.hardware import usable_cores

RESULTS = Path(__file__).parent / "results"
# Of processors that compute in fp32, beside those of processors that compute in bf16.
NAME = "versus" if settings.BF16 else "versus_fp32"
RUNS, SWEEP, SUMMARY = (RESULTS / f"{NAME}{rest}" for rest in ("_runs.jsonl", "_sweep.json", ".json"))
CHART = ROOT / "docs" / "speed.svg"
TOOLS = ("deltaw", "trl", "unsloth")
FIRST_STEPS, CURVES = ("short", "docstrings", "dense", "shared"), ("docstrings",)  # of the gates, without --workload
COLD_STEPS = 32  # of 16 short chats
KEPT_OF_SWEEP = (
    *("tool", "workload", "setting", "examples_per_step", "versions", "tokens_per_second", "peak_bytes", "steps"),
    "error",
)


def main() -> int:
    asked = parser().parse_args()
    bench = set_up(asked)
    try:
        return run(bench, asked)
    except OutOfTimeError:
        tell(f"the {asked.minutes:g} minutes are over; the same command goes on from here")
        return 1


def run(bench: Bench, asked: argparse.Namespace) -> int:
    """Does what the command line asks for; the exit code."""
    workloads = asked.workload or list(WORKLOADS)
    if asked.only:
        return only(bench, asked, workloads)
    if asked.sweep:
        sweep(bench, workloads, asked.seconds or 15.0)
        return 0
    if asked.table:
        return report(bench, "pair")
    if asked.verify:
        return finish_gates(verify(bench, asked))
    if asked.quick:
        rounds(bench, workloads, "quick", 1, seconds=asked.seconds or 10.0, warm_steps=1)
        return report(bench, "quick")
    return everything(bench, asked, workloads)


def everything(bench: Bench, asked: argparse.Namespace, workloads: list[str]) -> int:
    """The long form. Rounds go over all workloads in turn, so that time that runs out takes from all alike."""
    try:
        checked = verify(bench, asked)
        if not all(gate.passed for gate in checked) and not asked.despite:
            return finish_gates(checked)
        cold_starts(bench)
        gemm(bench, "before")
        try:
            rounds(bench, workloads, "pair", asked.pairs, seconds=asked.seconds or 30.0)
        finally:
            gemm(bench, "after", late=True)
        if settings.BF16:  # elsewhere TRL's bf16 autocast is emulated, and one step takes many minutes
            defaults(bench, workloads)
    finally:
        report(bench, "pair")
    return 0


def verify(bench: Bench, asked: argparse.Namespace) -> list[gates.Gate]:
    """Runs the gates and stores what they found."""
    chosen = asked.workload
    found = gates.verify(bench, chosen or FIRST_STEPS, chosen or CURVES, asked.gate_steps)
    stored = {gate["name"]: gate for gate in bench.rows.get("gates", {}).get("gates", [])}
    stored |= {gate["name"]: gate for gate in gates.as_dicts(found)}
    bench.keep("gates", {"gates": list(stored.values())})
    return found


# -- parts ------------------------------------------------------------------------------------------------------------


def rounds(bench: Bench, workloads: list[str], kind: str, count: int, **given: Any) -> None:
    """Every tool in turn, in fresh processes, `count` times; each time another one begins, since the machine drifts."""
    for number in range(1, count + 1):
        first = number % len(TOOLS)
        for workload in workloads:
            for tool in (*TOOLS[first:], *TOOLS[:first]):
                setting = settings.best(tool, workload, SWEEP)
                bench.once(f"{kind}/{workload}/{tool}/{number}", bench.job(tool, workload, setting, **given))


def defaults(bench: Bench, workloads: list[str]) -> None:
    """Each rival once as it comes, with its own 8 rows per step."""
    for workload in workloads:
        for tool, setting in settings.DEFAULTS.items():
            given = {"examples_per_step": settings.DEFAULT_EXAMPLES, "seconds": 10.0, "warm_steps": 1}
            bench.once(f"default/{workload}/{tool}", bench.job(tool, workload, setting, **given))


def cold_starts(bench: Bench) -> None:
    """512 short chats from process start to saved adapter, nothing compiled before by torch; then its held-out loss.

    Rows stay in their steps here, so that all learn from the same chats.
    """
    wanted = {tool: settings.same_steps(settings.best(tool, "short", SWEEP)) for tool in TOOLS}
    for tool in environments.RIVALS:
        if wanted[tool].get("compile"):
            wanted[f"{tool}, not compiled"] = {**wanted[tool], "compile": False}
    for name, setting in wanted.items():
        out = bench.folder("cold") / f"{bench.code} {name}"
        job = bench.job(name.partition(",")[0], "short", setting, steps=COLD_STEPS, out=str(out))
        row = bench.once(f"cold/{name}", job, fresh_compiler=True)
        if "error" not in row:
            gates.evaluate(bench, "short", "cold", name, str(out))


def gemm(bench: Bench, when: str, *, late: bool = False) -> None:
    """The machine's rate at the model's shapes; `late` also where the time is over."""
    deadline = bench.deadline
    bench.deadline = float("inf") if late else deadline
    bench.once(f"gemm/{when}", bench.job("gemm", "dense", {}))
    bench.deadline = deadline


def sweep(bench: Bench, workloads: list[str], seconds: float) -> None:
    """Every setting of every rival for some seconds; the stored list is complete after each run."""
    rows = json.loads(SWEEP.read_text("utf-8")) if SWEEP.is_file() else []
    for workload in workloads:
        wanted = [
            (tool, setting)
            for tool, setting in settings.sweep(workload)
            if not any((r["tool"], r["setting"]) == (tool, setting) for r in settings.swept(rows, workload))
        ]
        reference = wanted and launch(bench, bench.job("reference", workload, {}, task="loss"))["loss"]
        for tool, setting in wanted:
            tell(f"sweep/{workload}/{tool}/{settings.label(setting)}")
            row = launch(bench, bench.job(tool, workload, setting, seconds=seconds, warm_steps=2))
            rows.append(swept(row, reference))
            SWEEP.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", "utf-8")
        for tool in environments.RIVALS:
            tell(f"best of {tool} on {workload}: {settings.label(settings.best(tool, workload, SWEEP))}")


def swept(row: Row, reference: float) -> Row:
    """What is published of a run of the sweep. Parity: its first loss is that of an fp32 model, up to bf16's noise.

    Where rows were moved between steps, the first step is another one, and only a gradient in every step is asked for.
    """
    kept = {name: row[name] for name in KEPT_OF_SWEEP if name in row}
    if "error" in row:
        return {**kept, "parity": False}
    loss = row["losses"][0]
    near = abs(loss / reference - 1) < 0.03 or row["setting"]["group"] == "pool"
    alive = all(0 < norm < float("inf") for norm in row["grad_norms"])
    return {**kept, "first_loss": loss, "reference_loss": reference, "parity": near and alive}


def only(bench: Bench, asked: argparse.Namespace, workloads: list[str]) -> int:
    """One tool, now, and its numbers; nothing is stored."""
    for workload in workloads:
        setting = settings.parse(asked.setting, settings.best(asked.only, workload, SWEEP))
        row = launch(bench, bench.job(asked.only, workload, setting, seconds=asked.seconds or 30.0, steps=asked.steps))
        if "error" in row:
            print(f"{workload:<11} failed: {row['error']}")
            continue
        print(
            f"{workload:<11} {row['tokens_per_second']:>7.1f} tok/s, peak {row['peak_bytes'] / 1e9:.2f} GB, "
            f"{row['steps']} steps, loss {row['losses'][0]:.4f} → {row['losses'][-1]:.4f}  ({settings.label(setting)})"
        )
    return 0


def finish_gates(found: list[gates.Gate]) -> int:
    """All gates, and the exit code."""
    for gate in found:
        print(gate.line())
    failed = [gate.name for gate in found if not gate.passed]
    print(json.dumps({"gates": len(found), "failed": failed}))
    return 1 if failed else 0


def report(bench: Bench, kind: str) -> int:
    """Prints the table; of the long form, also writes the summary and the chart."""
    found = summary.summarise(bench, kind, bench.rows.get("gates", {}).get("gates", []))
    if not found["workloads"]:
        tell("no rows are stored yet")
        return 1
    found["rivals_at"] = "best of a sweep" if SWEEP.is_file() else "as was best in earlier runs"
    print(summary.table(found))
    if kind == "pair":
        SUMMARY.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        if settings.BF16:
            chart.draw(found, CHART)
    print(json.dumps({"geometric_mean": found["geometric_mean"], "worst_cell": found["worst_cell"]}))
    return 0


# -- set-up -----------------------------------------------------------------------------------------------------------


def set_up(asked: argparse.Namespace) -> Bench:
    """Environments, rows, and what is stored already."""
    envs = asked.envs.absolute()
    file = RUNS if not asked.quick else envs / "quick.jsonl"
    if asked.fresh:
        file.unlink(missing_ok=True)
    if not asked.table and asked.only != "deltaw":
        environments.make(envs)
    bench = Bench(envs, file, str(locate(BASE)), usable_cores())
    if not (asked.table and (envs / "data" / "workloads.json").is_file()):
        encode_workloads(envs / "data")
    bench.open()
    bench.deadline = time.time() + 60 * asked.minutes
    return bench


def encode_workloads(folder: Path) -> None:
    """The rows that every tool reads, made anew where what makes them has changed."""
    recipe = [HERE / "workloads.py", *sorted((ROOT / "deltaw" / "data").rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in recipe) + repr(WORKLOADS).encode())
    made = folder / "made_by.sha256"
    if made.is_file() and made.read_text("utf-8") == digest.hexdigest():
        return
    tell("encoding the workloads")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, str(HERE / "workloads.py"), str(folder)], check=True)
    made.write_text(digest.hexdigest(), "utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, words in (
        ("quick", "one round per workload, ten seconds each"),
        ("verify", "the parity gates alone"),
        ("sweep", "measure the rivals' settings"),
        ("table", "table, summary and chart from the stored rows"),
        ("fresh", "forget the stored rows first"),
        ("despite", "measure although a gate failed"),
    ):
        made.add_argument(f"--{name}", action="store_true", help=words)
    made.add_argument("--only", choices=TOOLS, help="run one tool and store nothing")
    made.add_argument("--workload", action="append", choices=list(WORKLOADS), help="instead of all; may be repeated")
    made.add_argument("--setting", default="", help="for --only: what differs from the best, as batch=8,compile=true")
    made.add_argument("--seconds", type=float, help="length of the steady part of a run")
    made.add_argument("--steps", type=int, help="for --only: exactly so many steps")
    made.add_argument("--gate-steps", type=int, default=gates.STEPS, help="steps of the gates' curves")
    made.add_argument("--pairs", type=int, default=5, help="rounds of the long form")
    made.add_argument("--minutes", type=float, default=90.0, help="begin no run after so many minutes")
    made.add_argument("--envs", type=Path, default=ROOT / ".versus", help="where environments and rows are made")
    return made


if __name__ == "__main__":
    sys.exit(main())
