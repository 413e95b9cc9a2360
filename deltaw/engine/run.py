"""Run: a folder. Settings as resolved, metrics, checkpoints, the best and the last adapter, summary, report.

This module imports nothing heavy, so that the folder stands within a second of the start, before torch is loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from deltaw.base.builtin import BUILTIN
from deltaw.config import AUTO, HUB, Settings, make_settings
from deltaw.data.findings import refuse_unknown
from deltaw.data.formats import parse_sources
from deltaw.data.source import Source
from deltaw.disk import disk_errors, write_text
from deltaw.errors import AdapterError, UsageError, command

CONFIG = "config.yaml"
ENDED = ("done", "stopped early")  # what the summary says of a run that has nothing left to do
HEADER = "# Settings of this run as resolved, and where each came from.\n"
ADAPTER_SETTINGS = (
    *("rank", "alpha", "targets", "exclude", "layers", "dropout", "rslora", "dora", "rank_pattern", "alpha_pattern"),
)


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
    def clock(self) -> Path:
        """What the clock decided in a run of minutes."""
        return self.folder / "clock.jsonl"

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
    def start(self) -> Path:
        """A copy of the adapter that the run starts from, if it does."""
        return self.folder / "start"

    @property
    def tokens(self) -> Path:
        """Token files of the data."""
        return self.folder / "tokens"

    @property
    def forgetting(self) -> Path:
        """What was gained and forgotten by strength, where that was measured."""
        return self.folder / "forgetting.json"

    @property
    def inspected(self) -> Path:
        """The page of `deltaw inspect`, where it was written here."""
        return self.folder / "inspect.html"

    @property
    def plan(self) -> Path:
        """What it was said to cost before it began."""
        return self.folder / "plan.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time trains a run; the system frees the lock when that process dies. UsageError."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise UsageError(f"Another process is training {self.folder}; wait for its end, or stop it.") from error
        try:
            yield
        finally:
            os.close(descriptor)

    def has_steps(self) -> bool:
        """Whether a step was ever taken."""
        return self.metrics.is_file() and self.metrics.stat().st_size > 0

    def write_settings(self, settings: Settings) -> None:
        """Writes the settings as they are resolved now."""
        write_text(self.config, HEADER + yaml.safe_dump(settings.resolved(), sort_keys=False, allow_unicode=True))

    def settings(self) -> Settings:
        """The settings of this run, with their sources. Raises UsageError when they cannot be read."""
        try:
            stored = yaml.safe_load(self.config.read_text("utf-8"))
            values, sources = ({name: entry[part] for name, entry in stored.items()} for part in ("value", "source"))
        except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.config} does not hold the settings of a run ({type(error).__name__}: {error}). Each is a name "
                "with a `value` and a `source` below it."
            ) from error
        settings = make_settings(values)
        settings.sources = sources
        return settings

    def tidy(self) -> None:
        """Removes what a process that was killed left half written. For whoever holds the lock."""
        begun = [*self.checkpoints.glob(".step-*.tmp"), *self.folder.glob(".probe-*")]
        for whole in (self.adapter, self.last):
            begun += self.folder.glob(f".{whole.name}.*") if whole.exists() else []
        for path in begun:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def read_summary(self) -> dict[str, Any]:
        """The summary, empty when the run has not ended yet."""
        return json.loads(self.summary.read_text("utf-8")) if self.summary.is_file() else {}

    def read_plan(self) -> dict[str, Any]:
        """What the run was planned to take, empty where it was not planned or the file is damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return dict(json.loads(self.plan.read_text("utf-8")))
        return {}

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes the summary."""
        write_text(self.summary, json.dumps(summary, indent=2) + "\n")


def create_run(settings: Settings) -> Run:
    """A new run folder with the settings in it, paths made absolute so that the run can go on from anywhere.

    Raises UsageError when the folder exists already or no data is named, DataError when a data file is missing, and
    DiskError when the folder cannot be made.
    """
    folder = Path(settings.out).expanduser() if settings.out else _dated_folder()
    if folder.exists():
        hint = f"Go on with it by --resume {folder}," if _is_run(folder) else "Move it away,"
        raise UsageError(f"{folder} exists already and is never overwritten. {hint} or choose another --out.")
    if not settings.data:
        raise UsageError("No training data: give --data FILE (or a recipe with `data:`).")
    refuse_unknown(settings.allow)
    _refuse_second_adapter(settings)
    _refuse_missing_adapter(settings)
    _make_paths_absolute(settings)
    if settings.date == AUTO:  # written down, so that a run resumed tomorrow renders the same
        settings.put("date", datetime.now().date().isoformat(), "the day the run began")
    with disk_errors("make", folder):
        folder.mkdir(parents=True)
    run = Run(folder)
    settings.out = str(folder.resolve())
    try:
        if settings.adapter is not None:
            with disk_errors("copy the adapter to", folder):
                shutil.copytree(settings.adapter, run.start)
        run.write_settings(settings)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it could neither go on nor be begun again
        raise
    return run


def _make_paths_absolute(settings: Settings) -> None:
    for name in ("data", "eval_data"):
        if getattr(settings, name):
            texts = [_absolute(*pair) for pair in zip(getattr(settings, name), _sources(settings, name), strict=True)]
            settings.put(name, tuple(texts), settings.sources.get(name, "given"))
    for name in ("adapter", "model"):
        value = getattr(settings, name)
        if value is not None and value not in BUILTIN and Path(value).expanduser().exists():
            path = Path(value).expanduser().resolve()
            path = adapter_folder(path) if name == "adapter" else path
            settings.put(name, str(path), settings.sources.get(name, "given"))


def _refuse_second_adapter(settings: Settings) -> None:
    both = [name for name in ADAPTER_SETTINGS if settings.sources.get(name) in ("given", "recipe")]
    if settings.adapter is not None and both:
        raise UsageError(
            f"--adapter brings its own {', '.join(both)}. Leave {'them' if len(both) > 1 else 'that'} out, or start a "
            "new adapter without --adapter."
        )


def _refuse_missing_adapter(settings: Settings) -> None:
    if settings.adapter is None:
        return
    folder = adapter_folder(Path(settings.adapter).expanduser())
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"--adapter {settings.adapter}: there is no adapter in {folder}.")


def _sources(settings: Settings, name: str) -> list[Source]:
    sources = parse_sources(getattr(settings, name), settings.columns)
    for source in sources:
        source.files  # noqa: B018 - raises when there are none
    return sources


def _absolute(text: str, source: Source) -> str:
    """The source with its path, or glob, as it is found from anywhere."""
    if source.name.startswith(HUB):
        return text
    _, separator, options = text.partition("::")
    path = Path(source.name).expanduser()
    if path.exists() or path.is_absolute():
        return f"{path.absolute()}{separator}{options}"
    return f"{Path(glob.escape(str(Path.cwd()))) / path}{separator}{options}"  # a pattern; what is before it is none


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that a run or adapter folder stands for. AdapterError when the run has none yet."""
    path = Path(path)
    if not _is_run(path):
        return path
    if not (path / "adapter").is_dir():
        raise AdapterError(
            f"The run {path} has no adapter yet: it was stopped before one was saved. Go on with: "
            + command(f"train --resume {path}")
        )
    return path / "adapter"


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run: other config.yaml files begin otherwise."""
    try:
        with (folder / CONFIG).open(encoding="utf-8") as file:
            return file.readline() == HEADER
    except (OSError, UnicodeDecodeError):
        return False


def run_of(path: Path) -> Run | None:
    """The run that a folder is, or is the adapter of; None for an adapter that stands alone."""
    folders = (path, path.absolute().parent)
    return next((Run(folder) for folder in folders if _is_run(folder)), None)


def _dated_folder() -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = [f"runs/{stamp}", *(f"runs/{stamp}-{number}" for number in range(2, 100))]
    return next(Path(name) for name in names if not Path(name).exists())


def open_run(folder: Path) -> Run:
    """An existing run folder; UsageError when it is none."""
    if not _is_run(folder):
        there = (folder / CONFIG).is_file()
        why = f"its {CONFIG} does not begin as that of a run; was it changed?" if there else f"it has no {CONFIG}."
        raise UsageError(f"{folder} is not a run folder: {why}")
    return Run(folder)
