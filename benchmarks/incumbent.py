"""The same accidents for Hugging Face Trainer with PEFT and for deltaw, side by side, each with the real libraries.

A tiny Llama (two layers, hidden 64), LoRA r = 8 on all linear layers, on the CPU. The rows have the numbers of the list
that asked for them; B6 (accumulation) and B13 (portable export) are proved by tests instead. Prints a table in Markdown
and writes benchmarks/results/incumbent.json. Takes about ten minutes on two cores.
Usage: python benchmarks/incumbent.py [--runs 14] [--only B1,B5]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "incumbent.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "jinja2")
Row = dict[str, Any]


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(folder: Path, runs: int, mutated: int, only: set[str]) -> Row:
    """The rows asked for, each with what both stacks did and the seconds that it took."""
    sys.path.insert(0, str(Path(__file__).parent))
    on_runs, on_adapters = map(importlib.import_module, ("incumbent_runs", "incumbent_adapters"))
    on_runs.torch.set_num_threads(1)
    ground = on_runs.make_ground(folder)
    accidents: dict[str, Callable[[Any], Row]] = {
        "B1": lambda each: on_runs.kills(each, runs),
        "B2": on_runs.cuts,
        "B3": on_runs.flips,
        "B4": on_runs.disk_full,
        "B5": on_runs.nan,
    }
    strangers: dict[str, Callable[[Any], Row]] = {
        "B7": on_adapters.bad_adapters,
        "B8": on_adapters.regex_bomb,
        "B9": lambda where: on_adapters.mutations(where, mutated),
        "B10": on_adapters.template_bomb,
        "B11": on_adapters.compiled,
        "B12": on_adapters.resized,
    }
    found: Row = {}
    if only & accidents.keys():
        stacks = {kind: on_runs.Ground(getattr(on_runs, kind.title())(ground), folder / kind) for kind in KINDS}
        for key in [key for key in accidents if key in only]:
            found[key] = _timed({kind: lambda k=kind, a=key: accidents[a](stacks[k]) for kind in KINDS})
    on_adapters.make_adapters(ground)
    for key in [key for key in strangers if key in only]:
        started = time.monotonic()
        found[key] = strangers[key](ground) | {"seconds": round(time.monotonic() - started, 1)}
        print(key, f"{found[key]['seconds']} s", file=sys.stderr)
    return found


KINDS = ("incumbent", "deltaw")


def _timed(acts: dict[str, Callable[[], Row]]) -> Row:
    found: Row = {}
    for kind, act in acts.items():
        started = time.monotonic()
        found[kind] = act()
        found[kind]["seconds"] = round(time.monotonic() - started, 1)
        print(kind, f"{found[kind]['seconds']} s", file=sys.stderr)
    return found


def versions() -> dict[str, str]:
    """What was compared, and under what."""
    known = {name: importlib.metadata.version(name) for name in PACKAGES}
    deltaw = importlib.import_module("deltaw").__version__
    return {"deltaw": deltaw, "python": platform.python_version(), **known, "machine": platform.machine()}


# -- the table ---------------------------------------------------------------------------------------------------------


def table(rows: Row) -> str:
    """The rows in Markdown."""
    lines = ["| | accident | Trainer + PEFT | deltaw |", "|---|---|---|---|"]
    for key, (title, write) in ROWS.items():
        if key in rows:
            lines.append(f"| {key} | {title} | " + " | ".join(write(rows[key])) + " |")
    return "\n".join(lines)


def _outcomes(outcomes: dict[str, int]) -> str:
    """Counts, with all that could not resume as one."""
    merged: dict[str, int] = {}
    for outcome, count in outcomes.items():
        short = "**could not resume**" if outcome.startswith("could not resume") else outcome
        short = short.replace("different", "**different**") if outcome == "different" else short
        merged[short] = merged.get(short, 0) + count
    return ", ".join(f"{count} {outcome}" for outcome, count in merged.items())


def _kills(row: Row) -> list[str]:
    texts = []
    for kind in KINDS:
        each = row[kind]
        text = f"{each['runs']} runs, {each['kills']} kills: {_outcomes(each['outcomes'])}"
        repaired = each.get("after_deleting_the_newest_checkpoint_by_hand")
        texts.append(text + (f"; after deleting the broken one by hand: {_outcomes(repaired)}" if repaired else ""))
    return texts


def _cuts(row: Row) -> list[str]:
    return [
        f"{row[kind]['beside_an_older_one']['points']} points, an older one beside it: "
        f"{_outcomes(row[kind]['beside_an_older_one']['outcomes'])}; "
        f"{row[kind]['alone']['points']} points, alone: {_outcomes(row[kind]['alone']['outcomes'])}"
        for kind in KINDS
    ]


def _flips(row: Row) -> list[str]:
    return [_by_outcome(row[kind]["files"], row[kind]["flips_per_file"]) for kind in KINDS]


def _by_outcome(files: dict[str, dict[str, int]], times: int) -> str:
    """Which files came out how, and how often of the times."""
    groups: dict[str, list[str]] = {}
    for name, outcomes in files.items():
        for outcome, count in outcomes.items():
            groups.setdefault(outcome, []).append(f"{name} {count} of {times}")
    parts = [f"{outcome}: {', '.join(names)}" for outcome, names in sorted(groups.items(), reverse=True)]
    return "; ".join(parts).replace("silently different", "**silently different**")


def _full(row: Row) -> list[str]:
    return [
        f"{row[kind]['how']}: exit {row[kind]['exit_code']}; "
        f"with space again: {_outcomes({row[kind]['with_space_again']: 1}).removeprefix('1 ')}"
        for kind in KINDS
    ]


def _nan(row: Row) -> list[str]:
    texts = []
    for kind in KINDS:
        each = row[kind]
        logged = ", ".join(f"{loss} ({count} times)" for loss, count in each["losses_logged_after"].items())
        saved = "**NaN adapter saved**" if each["final_adapter_is_nan"] else "no NaN in any saved adapter"
        texts.append(
            f"{each['steps_that_followed']} more steps, exit {each['exit_code']}, "
            f"losses logged: {logged or 'none'}, {saved}"
        )
    return texts


READERS = ("incumbent", "deltaw", "deltaw, with its manifest")


def _bad(row: Row) -> list[str]:
    counts = {reader: _grouped(row, reader) for reader in READERS}
    return [counts["incumbent"], f"{counts['deltaw']}. With deltaw's manifest: {counts['deltaw, with its manifest']}"]


def _grouped(row: Row, reader: str) -> str:
    groups: dict[str, list[str]] = {}
    for name, readers in row.items():
        if isinstance(readers, dict):
            found = readers[reader]
            output = f", output {found['output']}" if "output" in found else ""
            groups.setdefault(f"{found['outcome']}{output}", []).append(name)
    parts = [
        f"{len(names)} {what}" + ("" if what == "refused" else f" ({', '.join(names)})")
        for what, names in sorted(groups.items(), key=lambda item: item[0] != "refused")
    ]
    return "; ".join(parts)


def _regex(row: Row) -> list[str]:
    ours = row["deltaw"]
    loaded = "loaded, pattern never run" if ours["outcome"] == "loaded silently" else ours["outcome"]
    return [row["incumbent"]["outcome"], f"{loaded}, {ours['seconds']} s"]


def _mutations(row: Row) -> list[str]:
    def of(reader: str) -> str:
        found, count = row[reader], row["mutated"]
        texts = [f"{100 * n / count:.1f} % {what}" for what, n in sorted(found.items(), reverse=True)]
        return ", ".join(texts).replace("accepted with changed content", "**accepted with changed content**")

    return [of("incumbent"), f"{of(READERS[2])}. Without a manifest: {of('deltaw')}"]


def _template(row: Row) -> list[str]:
    return [
        f"{row[kind]['outcome'].split(':')[0]}, {row[kind]['seconds']} s, {row[kind]['added_mb']:,} MB more"
        for kind in KINDS
    ]


def _compiled(row: Row) -> list[str]:
    theirs = [
        f"{kind}: {row[kind]['incumbent']['outcome']}"
        + (f", output {row[kind]['incumbent']['output']}" if "output" in row[kind]["incumbent"] else "")
        for kind in ("targets by suffix", "all-linear")
    ]
    ours = {row[kind]["deltaw"]["outcome"] for kind in ("targets by suffix", "all-linear")}
    return ["; ".join(theirs), f"{', '.join(ours)}; making one itself: {row['deltaw, making one itself']['outcome']}"]


def _resized(row: Row) -> list[str]:
    theirs = row["incumbent"]
    warned = f'warning: "{theirs["warnings"][0]}"' if theirs["warnings"] else "no warning"
    return [
        f"{theirs['embedding_tensors_in_file']} of the 2 resized tensors in the file, {warned}; "
        f"{theirs['embedding_tensors_when_asked_for']} when asked for",
        f"cannot add tokens; a file of PEFT that holds them: {row['deltaw']['outcome']} by name",
    ]


ROWS: dict[str, tuple[str, Callable[[Row], list[str]]]] = {
    "B1": ("`kill -9` at two random times of a run, then on to the end", _kills),
    "B2": ("stopped at each point of writing a checkpoint", _cuts),
    "B3": ("one bit flipped in a file of the newest checkpoint", _flips),
    "B4": ("disk full while saving", _full),
    "B5": ("one `lora_B` becomes NaN after step 20 of 60", _nan),
    "B7": ("eleven bad adapters", _bad),
    "B8": ("a regular expression that never ends in `target_modules`", _regex),
    "B9": ("a safetensors file changed in one place", _mutations),
    "B10": ("a chat template that builds 1 GB", _template),
    "B11": ("an adapter saved from a base after `torch.compile`", _compiled),
    "B12": ("four new tokens, the base's config out of reach, saved", _resized),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=14, help="runs of B1, each killed twice (default 14)")
    parser.add_argument("--mutated", type=int, default=20_000, help="files of B9 (default 20,000)")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas; others keep their numbers")
    asked = parser.parse_args(arguments)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = known["rows"] | measure(Path(folder), asked.runs, asked.mutated, set(asked.only.split(",")))
    rows = {key: rows[key] for key in ROWS if key in rows}
    seconds = round(time.monotonic() - started, 1)
    command = " ".join(["python benchmarks/incumbent.py", *arguments])
    content = {"command": command, "versions": versions(), "seconds": seconds, "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
