"""Watcher: what a run tells whoever watches it. Nothing heavy is imported, so that a terminal can draw at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.engine.loop import Length, Progress
    from deltaw.engine.train import Trainer


class Watcher:
    """What a run tells whoever watches; every method does nothing here. The command line draws, tests listen."""

    def planned(self, plan: dict[str, Any]) -> None:
        """What the run will cost, before its base is opened."""

    def say(self, text: str) -> None:
        """One line about what happens."""

    def reading(self, rows: int) -> None:
        """So many rows of the data have been read, while more follow."""

    def start(self, trainer: Trainer) -> None:
        """Everything is ready; the first step follows."""

    def follow(self) -> None:
        """The same for several adapters together, of which no single trainer tells."""

    def step(self, line: dict[str, Any], progress: Progress, length: Length) -> None:
        """A step has ended; `line` is its metrics line."""

    def evaluation(self, line: dict[str, Any], best: bool) -> None:
        """An evaluation has ended."""

    def stopping(self) -> None:
        """A signal asked to stop. Called inside the signal handler, so it may do nothing but write raw bytes."""

    def stop(self) -> None:
        """No step follows."""
