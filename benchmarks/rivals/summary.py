"""Stored rows → the numbers that are quoted: medians of paired ratios, memory, losses, share of the GEMM rate."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rivals.measure import Bench, Row
from rivals.settings import BASE, WORKLOADS, label, ours

RIVALS = ("trl", "unsloth")
RANK = 16


def summarise(bench: Bench, kind: str, gates: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything about the rows of one kind ("pair", or "quick")."""
    cells = {name: cell for name in WORKLOADS if (cell := workload_cell(bench, kind, name))}
    ratios = {(w, tool): cell["ratios"][tool]["median"] for w, cell in cells.items() for tool in cell["ratios"]}
    worst = min(ratios, key=lambda pair: ratios[pair], default=None)
    return {
        "machine": machine(bench),
        "code": bench.code,
        "base": BASE,
        "workloads": cells,
        "geometric_mean": {tool: _geometric([r for (_, t), r in ratios.items() if t == tool]) for tool in RIVALS},
        "worst_cell": None if worst is None else {"workload": worst[0], "against": worst[1], "ratio": ratios[worst]},
        "cold": cold(bench),
        "gates": gates,
    }


def workload_cell(bench: Bench, kind: str, workload: str) -> dict[str, Any]:
    """What was measured on one workload; empty without a run of deltaw."""
    runs = {tool: _runs(bench, kind, workload, tool) for tool in ("deltaw", *RIVALS)}
    if not runs["deltaw"]:
        return {}
    tools = {tool: tool_numbers(list(found.values())) for tool, found in runs.items() if found}
    defaults = {tool: row for tool in RIVALS if (row := bench.rows.get(f"default/{workload}/{tool}"))}
    return {
        "tools": tools,
        "defaults": {tool: _default(row) for tool, row in defaults.items()},
        "ratios": {tool: paired(runs["deltaw"], runs[tool]) for tool in RIVALS if runs[tool].keys() & runs["deltaw"]},
        "memory_ratios": {tool: memory(tools["deltaw"], tools[tool]) for tool in RIVALS if tool in tools},
        # Where beginnings are shared, deltaw's tokens are not all computed, and such a share would mean nothing.
        "gemm_share": {} if ours(workload).get("share") else gemm_shares(bench, workload, tools),
    }


def _runs(bench: Bench, kind: str, workload: str, tool: str) -> dict[int, Row]:
    """The sound rows of a tool, by round."""
    start = f"{kind}/{workload}/{tool}/"
    return {int(k.removeprefix(start)): r for k, r in bench.rows.items() if k.startswith(start) and "error" not in r}


def tool_numbers(rows: list[Row]) -> dict[str, Any]:
    """Medians over the rounds, with the quartiles of the rate."""
    rates = sorted(row["tokens_per_second"] for row in rows)
    return {
        "setting": label(rows[-1]["setting"]),
        "versions": rows[-1]["versions"],
        "rounds": len(rows),
        "examples_per_step": rows[-1]["examples_per_step"],
        "tokens_per_second": statistics.median(rates),
        "quartiles": statistics.quantiles(rates, n=4)[::2] if len(rates) > 2 else [rates[0], rates[-1]],
        "labelled_per_second": statistics.median(row["labelled_per_second"] for row in rows),
        "peak_bytes": statistics.median(row["peak_bytes"] for row in rows),
        "pss_peak_bytes": statistics.median(row["pss_peak_bytes"] for row in rows),
        "import_bytes": statistics.median(row["import_bytes"] for row in rows),
        "steal_share": max(row["steal_share"] for row in rows),
    }


def _default(row: Row) -> dict[str, Any]:
    kept = ("tokens_per_second", "peak_bytes", "error")
    return {"setting": label(row["setting"]), **{name: row[name] for name in kept if name in row}}


def paired(ours: dict[int, Row], theirs: dict[int, Row]) -> dict[str, Any]:
    """deltaw's rate over a rival's, round by round."""
    rounds = sorted(ours.keys() & theirs.keys())
    ratios = [ours[i]["tokens_per_second"] / theirs[i]["tokens_per_second"] for i in rounds]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "rounds": len(ratios)}


def memory(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """deltaw's peak over a rival's: of the process, and of what each holds beyond its imports."""
    return {
        "peak": ours["peak_bytes"] / theirs["peak_bytes"],
        "beyond_imports": (ours["peak_bytes"] - ours["import_bytes"]) / (theirs["peak_bytes"] - theirs["import_bytes"]),
    }


# -- the GEMM rate ----------------------------------------------------------------------------------------------------


def gemm_shares(bench: Bench, workload: str, tools: dict[str, Any]) -> dict[str, Any]:
    """Useful GFLOP/s of each tool, and as a share of the rate measured around the runs."""
    rates = [row["gflops"] for key, row in bench.rows.items() if key.startswith("gemm/") and "gflops" in row]
    if not rates:
        return {}
    rate, flops = statistics.median(rates), flops_per_token(bench, workload)
    useful = {tool: numbers["tokens_per_second"] * flops / 1e9 for tool, numbers in tools.items()}
    return {
        "gemm_gflops": rate,
        "flops_per_token": flops,
        "useful_gflops": useful,
        "share": {tool: value / rate for tool, value in useful.items()},
    }


def flops_per_token(bench: Bench, workload: str) -> float:
    """4·N + 7·L·a·T + 6·P: frozen products forward and for dX, causal attention, factors.

    N counts the blocks' linear layers and the head's share of labelled tokens; T is Σt²/Σt over the documents, so each
    attends to itself only. What a tool computes beyond that (padding, recomputed activations) is not useful work.
    """
    config = json.loads((Path(bench.base) / "config.json").read_text("utf-8"))
    shape = json.loads((bench.envs / "data" / "workloads.json").read_text("utf-8"))["workloads"][workload]
    hidden, inner, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    width = hidden // config["num_attention_heads"]
    a, kv = hidden, width * config["num_key_value_heads"]
    layers = [(hidden, a), (hidden, kv), (hidden, kv), (a, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    linear = blocks * sum(k * n for k, n in layers)
    factors = blocks * RANK * sum(k + n for k, n in layers)
    head = config["vocab_size"] * hidden * shape["labelled_share"]
    return 4 * (linear + head) + 7 * blocks * a * shape["context_tokens"] + 6 * factors


# -- the rest ---------------------------------------------------------------------------------------------------------


def cold(bench: Bench) -> dict[str, Any]:
    """The jobs timed from process start to saved adapter, and the held-out loss of what they saved."""
    found = {}
    for key, row in bench.rows.items():
        if key.startswith("cold/") and "error" not in row:
            name = key.removeprefix("cold/")
            loss = bench.rows.get(f"held out/short/cold/{name}", {}).get("loss")
            found[name] = {
                "chats": row["steps"] * row["examples_per_step"],
                "seconds": row["process_seconds"],
                "held_out_loss": loss,
                "setting": label(row["setting"]),
            }
    return found


def machine(bench: Bench) -> dict[str, Any]:
    """What it was measured on."""
    gemm = {key.removeprefix("gemm/"): row.get("gflops") for key, row in bench.rows.items() if key.startswith("gemm/")}
    return {"cpu": bench.cpu, "cores": bench.cores, "gemm_gflops": gemm}


def _geometric(values: list[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


# -- for people -------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The summary as lines of text."""
    lines = [f"{'workload':<11} {'tool':<9} {'tok/s':>7} {'deltaw ×':>9} {'peak GB':>8} {'memory ×':>9}  setting"]
    worst = found["worst_cell"] or {}
    for workload, cell in found["workloads"].items():
        for tool, numbers in cell["tools"].items():
            ratio = cell["ratios"].get(tool, {}).get("median")
            here = worst.get("workload") == workload and worst.get("against") == tool
            times = "" if ratio is None else f"{ratio:.2f}{'!' if here else ' '}"
            held = cell["memory_ratios"].get(tool, {}).get("peak")
            lines.append(
                f"{workload:<11} {tool:<9} {numbers['tokens_per_second']:>7.0f} {times:>9} "
                f"{numbers['peak_bytes'] / 1e9:>8.2f} {'' if held is None else format(held, '.2f'):>9}"
                f"  {numbers['setting']}"
            )
        for tool, numbers in cell["defaults"].items():
            rate, peak = numbers.get("tokens_per_second", math.nan), numbers.get("peak_bytes", math.nan)
            lines.append(f"{workload:<11} {tool:<9} {rate:>7.0f} {'':>9} {peak / 1e9:>8.2f} {'':>9}  its defaults")
    return "\n".join(lines + _notes(found))


SHOWN = {
    "short": "short chats",
    "docstrings": "docstring chats",
    "dense": "rows of 1,024 trained tokens",
    "shared": "500 tokens of system prompt, {count} chats a step",
}
COUNTS = {4: "four", 8: "eight", 16: "sixteen"}


def readme_table(found: dict[str, Any]) -> str:
    """The README's table of tokens per second and peak memory."""
    settings = [found["workloads"][workload]["tools"]["unsloth"]["setting"] for workload in SHOWN]
    compiled = ", compiled" if all("compile=true" in setting for setting in settings) else ""
    lines = [f"| workload | deltaw | PEFT + TRL | Unsloth, CPU{compiled} | peak memory |", "|---|---|---|---|---|"]
    for workload, shown in SHOWN.items():
        tools = [found["workloads"][workload]["tools"][tool] for tool in ("deltaw", *RIVALS)]
        name = shown.format(count=COUNTS[tools[0]["examples_per_step"]])
        rates = " | ".join(f"{tool['tokens_per_second']:,.0f}" for tool in tools)
        peaks = [f"{tool['peak_bytes'] / 1e9:.1f}" for tool in tools]
        lines.append(f"| {name} | {rates} | {peaks[0]}, {peaks[1]} and {peaks[2]} GB |")
    return "\n".join(lines)


def readme_sentences(found: dict[str, Any]) -> list[str]:
    """What else the README says of the rows."""
    worst, share = found["worst_cell"], found["workloads"]["dense"]["gemm_share"]["share"]
    cold, tool = found["cold"], {"trl": "TRL", "unsloth": "Unsloth"}[worst["against"]]
    rounds = [tool["rounds"] for shown in SHOWN for tool in found["workloads"][shown]["tools"].values()]
    passed, gates = sum(gate["passed"] for gate in found["gates"]), len(found["gates"])
    return [
        f"The worst cell is {SHOWN[worst['workload']].partition(', ')[0]} against {tool}, {worst['ratio']:.2f} times",
        "On rows of 1,024 tokens deltaw does "
        f"{100 * share['deltaw']:.0f} % of what the cores multiply, Unsloth {100 * share['unsloth']:.0f} %",
        f"512 short chats take {cold['deltaw']['seconds']:.0f} s, {cold['trl']['seconds']:.0f} s with TRL",
        f"{cold['unsloth, not compiled']['seconds']:.0f} s with Unsloth not compiled "
        f"({cold['unsloth']['seconds']:.0f} s compiled)",
        f"medians of {min(rounds)} interleaved",
        f"{'All' if passed == gates else f'{passed} of'} {gates} parity checks passed",
    ]


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    means = [f"{tool} {value:.2f}" for tool, value in found["geometric_mean"].items() if value]
    if found["worst_cell"]:
        notes.append(f"geometric mean: {', '.join(means)}; the worst cell is marked with !")
    share = found["workloads"].get("dense", {}).get("gemm_share")
    if share:
        shown = ", ".join(f"{tool} {value:.0%}" for tool, value in share["share"].items())
        notes.append(f"useful work on dense rows as a share of {share['gemm_gflops']:.0f} GFLOP/s: {shown}")
    for name, run in found["cold"].items():
        loss = "" if run["held_out_loss"] is None else f", held-out loss {run['held_out_loss']:.4f}"
        notes.append(
            f"{run['chats']} short chats, process start to saved adapter, {name}: {run['seconds']:.1f} s{loss}"
        )
    failed = [gate["name"] for gate in found["gates"] if not gate["passed"]]
    if found["gates"]:
        notes.append(f"parity: {len(found['gates']) - len(failed)} of {len(found['gates'])} gates passed")
    return notes + [f"FAILED: {name}" for name in failed]
