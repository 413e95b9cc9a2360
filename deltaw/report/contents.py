"""What a run folder holds, read for the report: settings, metric lines, summary, and notes on what could not be read.

Not a judge of the run and not a schema: after a crash any file but config.yaml may be missing or torn, so a piece that
cannot be read becomes a note on the page instead of an error. The idea that keeps it short: everything behind this
module sees plain mappings in which any key may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deltaw.errors import UsageError
from deltaw.report.quantities import is_number

Line = Mapping[str, Any]
INSPECTED = "inspect.html"


@dataclass(frozen=True)
class ReportContents:
    """All that the page is made of; each field but the name may be empty.

    `settings` maps a name to {"value", "source"}; `steps` and `evaluations` are the two kinds of metric line, in order
    of their step; `forgetting` is what `deltaw eval --forgetting` left, a line for each strength; `inspected` names the
    page of `deltaw inspect`, if it lies there; `notes` are sentences about what is missing or unreadable.
    """

    run_name: str
    settings: Mapping[str, Line] = field(default_factory=dict)
    steps: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    forgetting: list[Line] = field(default_factory=list)
    inspected: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list; empty if `value` is no list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def read_contents(run_folder: Path) -> ReportContents:
    """Everything in `run_folder` that the report can use; only a missing config.yaml is an error."""
    if not (run_folder / "config.yaml").is_file():
        raise UsageError(f"{run_folder} is not a run folder: it has no config.yaml\nhint: name the folder of one run")
    notes: list[str] = []
    settings = _read_mapping(run_folder / "config.yaml", yaml.safe_load, notes)
    summary = _read_mapping(run_folder / "summary.json", json.loads, notes)
    steps, evaluations = _read_metrics(run_folder / "metrics.jsonl", notes)
    return ReportContents(
        # Resolved, because the name of Path(".") is empty; the folders above it stay out of the page.
        run_name=run_folder.resolve().name,
        settings={str(name): _setting(value) for name, value in settings.items()},
        steps=steps,
        evaluations=evaluations,
        forgetting=_read_forgetting(run_folder / "forgetting.json", notes),
        inspected=INSPECTED if (run_folder / INSPECTED).is_file() else "",
        summary=summary,
        notes=notes,
    )


def _setting(value: Any) -> Line:
    """A setting with its source; a bare value, as in a config written by hand, has none."""
    return value if isinstance(value, Mapping) and "value" in value else {"value": value, "source": ""}


def _read_mapping(path: Path, parse: Callable[[str], Any], notes: list[str]) -> Mapping[str, Any]:
    """The mapping in a file, or an empty one and a note."""
    if not path.is_file():
        notes.append(f"There is no {path.name}.")
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError, yaml.YAMLError):
        value = None
    if not isinstance(value, Mapping):
        notes.append(f"{path.name} could not be read and was left out.")
    return mapping(value)


def _read_forgetting(path: Path, notes: list[str]) -> list[Line]:
    """Lines of which each strength, loss and change are numbers; none where nobody measured."""
    if not path.is_file():
        return []
    try:
        lines = mappings(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except (ValueError, RecursionError):
        lines = []
    known = [line for line in lines if all(is_number(line.get(key)) for key in ("strength", "loss", "change", "kl"))]
    if not known:
        notes.append(f"{path.name} could not be read and was left out.")
    return known


def _read_metrics(path: Path, notes: list[str]) -> tuple[list[Line], list[Line]]:
    """Step lines and evaluation lines, each in order of the step."""
    if not path.is_file():
        notes.append(f"There is no {path.name}.")
        return [], []
    texts = [text for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if text.strip()]
    lines = [line for line in map(_parse_line, texts) if line is not None]
    if len(lines) < len(texts):
        notes.append(f"{len(texts) - len(lines)} of {len(texts)} lines of {path.name} could not be read.")
    evaluations = [line for line in lines if "eval_loss" in line]
    return _last_per_step([line for line in lines if "eval_loss" not in line]), _last_per_step(evaluations)


def _parse_line(text: str) -> Line | None:
    """One metric line; None if it is torn or is not a mapping with a step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, Mapping) and is_number(line.get("step")) else None


def _last_per_step(lines: list[Line]) -> list[Line]:
    """One line per step: a run that crashed and was resumed has written the steps since its checkpoint twice."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]
