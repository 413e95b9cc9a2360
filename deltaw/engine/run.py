"""Run: a folder. Settings as resolved, metrics, checkpoints, the best and the last adapter, summary, report.

This module imports nothing heavy, so that the folder stands within a second of the start, before torch is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from deltaw.base.builtin import BUILTIN
from deltaw.config import Settings, make_settings
from deltaw.data.source import find_files
from deltaw.disk import disk_errors, write_text
from deltaw.errors import UsageError

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """The paths of one run folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """Settings as resolved, each with where it came from."""
        return self.folder / CONFIG

    @property
    def metrics(self) -> Path:
        """One line per step and per evaluation."""
        return self.folder / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """What came of it."""
        return self.folder / "summary.json"

    @property
    def adapter(self) -> Path:
        """The best adapter by validation, else the last."""
        return self.folder / "adapter"

    @property
    def last(self) -> Path:
        """The adapter after the last step."""
        return self.folder / "last"

    @property
    def checkpoints(self) -> Path:
        """The last good checkpoints."""
        return self.folder / "checkpoints"

    @property
    def tokens(self) -> Path:
        """Token files of the data."""
        return self.folder / "tokens"

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    def write_settings(self, settings: Settings) -> None:
        """Writes the settings as they are resolved now."""
        header = "# Settings of this run as resolved, and where each came from.\n"
        write_text(self.config, header + yaml.safe_dump(settings.resolved(), sort_keys=False, allow_unicode=True))

    def settings(self) -> Settings:
        """The settings of this run, with their sources."""
        stored = yaml.safe_load(self.config.read_text("utf-8"))
        settings = make_settings({name: entry["value"] for name, entry in stored.items()})
        settings.sources = {name: entry["source"] for name, entry in stored.items()}
        return settings

    def read_summary(self) -> dict[str, Any]:
        """The summary, empty when the run has not ended yet."""
        return json.loads(self.summary.read_text("utf-8")) if self.summary.is_file() else {}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes the summary."""
        write_text(self.summary, json.dumps(summary, indent=2) + "\n")


def create_run(settings: Settings) -> Run:
    """A new run folder with the settings in it, paths made absolute so that the run can go on from anywhere.

    Raises UsageError when the folder exists already or no data is named, DataError when a data file is missing, and
    DiskError when the folder cannot be made.
    """
    folder = Path(settings.out) if settings.out else _dated_folder()
    if folder.exists():
        hint = f"Go on with it by --resume {folder}," if (folder / CONFIG).is_file() else "Move it away,"
        raise UsageError(f"{folder} exists already and is never overwritten. {hint} or choose another --out.")
    if not settings.data:
        raise UsageError("No training data: give --data FILE (or a recipe with `data:`).")
    _make_paths_absolute(settings)
    with disk_errors("make", folder):
        folder.mkdir(parents=True)
    settings.out = str(folder.resolve())
    run = Run(folder)
    run.write_settings(settings)
    return run


def _make_paths_absolute(settings: Settings) -> None:
    for name in ("data", "eval_data"):
        if getattr(settings, name):
            files = find_files(list(getattr(settings, name)))
            settings.put(name, tuple(map(str, files)), settings.sources.get(name, "given"))
    for name in ("adapter", "model"):
        value = getattr(settings, name)
        if value is not None and value not in BUILTIN and Path(value).expanduser().exists():
            path = Path(value).expanduser().resolve()
            path = adapter_folder(path) if name == "adapter" else path
            settings.put(name, str(path), settings.sources.get(name, "given"))


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that a run or adapter folder stands for."""
    path = Path(path)
    return path / "adapter" if (path / CONFIG).is_file() else path


def run_of(path: Path) -> Run | None:
    """The run that a folder is, or is the adapter of; None for an adapter that stands alone."""
    folders = (path, path.absolute().parent)
    return next((Run(folder) for folder in folders if (folder / CONFIG).is_file()), None)


def _dated_folder() -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = [f"runs/{stamp}", *(f"runs/{stamp}-{number}" for number in range(2, 100))]
    return next(Path(name) for name in names if not Path(name).exists())


def open_run(folder: Path) -> Run:
    """An existing run folder; UsageError when it is none."""
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {CONFIG}.")
    return Run(folder)
