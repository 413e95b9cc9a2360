"""What the clock decided in a run of minutes, written down, so that a resumed run decides the same again.

Where the length is a time, the rate of a step and the places of evaluations depend on how long steps took. Steps that
were done before a stop but behind the last checkpoint are done once more; they must take the rates they had.
"""

from __future__ import annotations

import json
from pathlib import Path

from deltaw.disk import disk_errors, write_text
from deltaw.engine.loop import Clock


class WrittenClock(Clock):
    """A Clock that repeats what stands in its file, and writes down what is new, in the place of a torn last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, tuple[float, float]] = {}
        self._done: dict[int, float] = {}
        written = path.read_text("utf-8", errors="replace") if path.is_file() else ""
        whole = ""
        for text in written.splitlines(keepends=True):
            try:
                line = json.loads(text if text.endswith("\n") else "")
                self._known[line["step"]] = (line["done"], line["seconds"])
            except (ValueError, KeyError, TypeError):
                break
            whole += text
        self._mended = None if whole == written else whole

    def done(self, step: int, now: float) -> float:
        """What was decided for this step before, else what the clock says now."""
        self._done[step] = self._known[step][0] if step in self._known else now
        return self._done[step]

    def seconds(self, step: int, measured: float) -> float:
        """What this step took before, else what was measured, which is written down."""
        if step in self._known:
            return self._known[step][1]
        self._known[step] = (self._done[step], measured)
        line = {"step": step, "done": self._done[step], "seconds": measured}
        if self._mended is not None:
            write_text(self.path, self._mended)
            self._mended = None
        with disk_errors("write", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return measured
