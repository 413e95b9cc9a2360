"""What a person sees of adapters and of speed: tables of ranks, spectra, comparisons. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from deltaw.analysis.curve import FEWEST
from deltaw.report.adapter_page import compared_notes
from deltaw.report.quantities import DASH, is_number
from deltaw.report.sweep_page import HEADINGS, cautions, cell_row, peak_of
from deltaw.terminal import human_bytes, human_seconds, pairs, percent, plain_table, served_elsewhere


def rank_page(console: Console, found: dict[str, Any]) -> None:
    """The retained-gain curve, what rank was needed, the verdict, and what they stand on."""
    rows = [("base", "0", f"{found['base_loss']:.4f}", "0 %", "")]
    shown = found["improves"]  # without a gain there is none to keep
    rows += [
        (
            *(f"rank {p['rank']}", f"{p['numbers']:,}", f"{p['loss']:.4f}"),
            *((percent(p["gain"]), _interval(p)) if shown else (DASH, DASH)),
        )
        for p in found["points"]
    ]
    console.print(plain_table(("", "numbers", "loss", "gain kept", "95 % interval"), rows))
    for title, points in found.get("orders", {}).items() if shown else ():
        kept = "  ".join(f"{p['rank']}: {percent(p['gain'])}" for p in points[:-1])
        console.print(f"{title:<36}{kept}", highlight=False, soft_wrap=True)
    console.print()
    spectra = found["spectra"]
    pairs(console, {
        **{f"rank for {need['share']:.0%} of the gain": _needed(need) for need in found["needed"] if shown},
        "verdict": found["verdict"],
        "measured on": f"{found['documents']:,} of {found['documents_given']:,} documents, {found['tokens']:,} "
        f"labelled tokens, in {human_seconds(found['seconds'])}"
        + ("" if _all_measured(found) else "; --all takes every one"),
        "spectra alone": f"effective rank {spectra['effective']:.1f}, stable {spectra['stable']:.1f}, "
        f"90 % of the energy in {spectra['energy_90']:.1f}: none of them is what a task needs",
    })  # fmt: skip


def _all_measured(found: dict[str, Any]) -> bool:
    return bool(found["documents"] + found["documents_for_ordering"] >= found["documents_given"])


def _interval(point: dict[str, Any]) -> str:
    return f"{percent(point['low'])} – {percent(point['high'])}"


def _needed(need: dict[str, Any]) -> str:
    span = str(need["high"]) if need["low"] == need["high"] else f"{need['low']} to {need['high']}"
    return span if need["determined"] else f"undetermined ({span}); more documents narrow it"


def compress_page(console: Console, record: dict[str, Any]) -> None:
    """What was made of an adapter, and what that cost."""
    least, most = record["ranks"].values()
    before, after = record["parameters_before"], record["parameters"]
    lines = {
        "adapter": f"{record['folder']} ({record['variant']})",
        "rank": str(most) if least == most else f"{least} to {most}, layer by layer",
        "numbers": f"{after:,} of {before:,} ({after / before:.1%}), {human_bytes(record['bytes'])}",
        "energy left out": f"{record['discarded_energy']:.2%} of ‖ΔW‖²",
    }
    if "loss_after" in record:
        loss = f"{record['loss_before']:.4f} before, {record['loss_after']:.4f} after (base {record['loss_base']:.4f})"
        lines["held-out loss"] = f"{loss}, {record['documents']:,} documents"
        if record["retained_gain_interval"] is None:
            lines["gain kept"] = record["verdict"]
        else:
            low, high = record["retained_gain_interval"]
            lines["gain kept"] = f"{percent(record['retained_gain'])} ({percent(low)} – {percent(high)})"
            if record["chosen_by_gain"]:
                lines["gain kept"] += "; these documents chose the ranks, so others may keep a little less"
    if not record["one_scale"]:
        lines["elsewhere"] = served_elsewhere(record["folder"], record["variant"], most)
    pairs(console, lines)


def spectra_table(console: Console, layers: Sequence[dict[str, Any]]) -> None:
    """One line per layer: the size of its update and how many directions carry it."""
    headings = ("layer", "‖ΔW‖", "σ₁", "σ last", "effective", "stable", "participation", "energy@90")
    rows = [
        (
            *(r["name"], f"{r['norm']:.4g}", f"{r['sigma'][0]:.4g}", f"{r['sigma'][-1]:.2g}"),
            *(f"{r[key]:.1f}" for key in ("effective", "stable", "participation")),
            str(r["energy_90"]),
        )
        for r in layers
    ]
    console.print()
    console.print(plain_table(headings, rows))


def beside_table(console: Console, layers: Sequence[dict[str, Any]]) -> None:
    """One line per layer: ΔW beside W, each number beside its control."""
    headings = ("layer", "‖ΔW‖/‖W‖", "amplification", "random", "W's own", "rounding", "intruders of 10")
    rows = [
        (
            *(r["name"], f"{r['relative_norm']:.2%}"),
            *(f"{r[key]:.3g}" for key in ("amplification", "random", "own", "rounding")),
            str(r["intruders"]),
        )
        for r in layers
    ]
    console.print()
    console.print(plain_table(headings, rows))
    console.print("Rounding: the largest singular value of the noise that storing W in its dtype adds.")
    console.print("What intruder dimensions mean is contested; they also appear in models that forget nothing.")


def compare_page(console: Console, found: dict[str, Any], other: str) -> None:
    """Two adapters: over all layers, then one line per layer, each number beside its null where it has one."""
    pairs(console, {
        "compared with": other,
        "cosine": f"{found['cosine']:+.4f} (unrelated updates: about 0)",
        "sign conflict": f"{_share(found['sign_conflict'])} (unrelated updates: {found['sign_conflict_null']:.0%})",
        "layers": f"{len(found['layers'])} in both, {len(found['only_first'])} and {len(found['only_second'])} in one",
    })  # fmt: skip
    for side, means in found["overlap"].items():
        lines = [
            (
                f"{i}",
                *(f"{_number(phi, '.2f')} ({_number(null, '.2f')})" for phi, null in zip(phis, nulls, strict=True)),
            )
            for i, phis, nulls in zip(means["first"], means["phi"], means["null"], strict=True)
        ]
        console.print()
        console.print(plain_table((f"φ(i, j), {side} side", *map(str, means["second"])), lines))
    headings = ("layer", "cosine", "sign conflict", "interference", "φ output", "null", "φ input", "null", "shared")
    rows = [
        (
            *(r["name"], f"{r['cosine']:+.3f}", _share(r["sign_conflict"]), _number(r["interference"], ".2f")),
            *(_number(r[side][key], ".3f") for side in ("output", "input") for key in ("phi_all", "phi_all_null")),
            ", ".join(_count(r[side]["shared_directions"]) for side in ("output", "input")),
        )
        for r in found["layers"]
    ]
    console.print()
    console.print(plain_table(headings, rows))
    for sentence in compared_notes(found):
        console.print(sentence)


def _number(number: float | None, form: str) -> str:
    return format(number, form) if is_number(number) else DASH


def _signed(number: float | None) -> str:
    return _number(number, "+.4f")


def _share(number: float) -> str:
    return _number(number, ".1%")


def _count(number: float) -> str:
    return _number(number, ".0f")


def sweep_page(console: Console, found: dict[str, Any]) -> None:
    """The cells of a sweep, best first, each with its paired distance from the best."""
    cells = found["cells"]
    measured = sorted((cell for cell in cells if cell["loss"] is not None), key=lambda cell: cell["loss"])
    if measured:
        console.print(plain_table(HEADINGS, [cell_row(cell) for cell in measured]))
        console.print()
    for sentence in cautions(found):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    pairs(console, {
        "time of the steps": f"{human_seconds(found['seconds'])} for {len(cells)} adapters of at most "
        f"{found['steps']} steps",
        "peak memory": peak_of(found),
        "page": f"{found['folder']}/sweep.html",
    })  # fmt: skip


def forgetting_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One line per strength of the adapter: what is gained on the data, and what is lost elsewhere."""
    lines = [
        (
            *(f"{r['strength']:g}", f"{r['data_loss']:.4f}", f"{r['loss']:.4f}"),
            f"{r['change']:+.4f} ({_signed(r['change_low'])} to {_signed(r['change_high'])})",
            *(f"{r['kl']:.4f}", f"{r['prompt_kl']:.4f}"),
        )
        for r in rows
    ]
    console.print()
    headings = ("strength", "loss on the data", "on neutral text", "change", "KL to the base", "KL on prompts")
    console.print(plain_table(headings, lines))
    first = rows[0]
    console.print(
        f"Neutral text: {first['documents']} documents, {first['tokens']:,} tokens. Prompts: {first['prompts']}, "
        f"{first['prompt_tokens']:,} tokens of the base's own answers. Nats per token."
        + ("" if first["documents"] >= FEWEST else " Too few for intervals to mean anything."),
        style="dim",
    )


def bench_tables(console: Console, found: dict[str, Any]) -> None:
    """One line per workload, then the shares of a step's time by part."""
    reason = f" ({found['slow_reason']})" if found["slow_reason"] else ""
    pairs(console, {
        "base": f"{found['base']}, {found['dtype']}, rank {found['rank']}, {found['threads']} threads",
        "computed by": found["way"] + reason,
    })  # fmt: skip
    headings = ("documents", "tokens/s", "ms a step", "useful GFLOP/s", "multiply rate", "share", "peak memory")
    workloads = found["workloads"]
    rows = [
        (
            f"{row['workload']} ({row['document_tokens']} tokens, {row['trained_share']:.0%} trained)",
            *(f"{row['tokens_per_second']:,.0f}", f"{1000 * row['step_seconds']:,.0f}"),
            *(f"{row['useful_gflops']:,.0f}", f"{row['gemm_gflops']:,.0f}"),
            *(f"{row['share_of_gemm']:.0%}", human_bytes(row["peak_bytes"])),
        )
        for row in workloads
    ]
    console.print(plain_table(headings, rows))
    parts = dict.fromkeys(part for row in workloads for part in row["parts"])
    shares = [(part, *(f"{row['parts'].get(part, 0):.0%}" for row in workloads)) for part in parts]
    console.print(plain_table(("time of a step by part", *(row["workload"] for row in workloads)), shares))
