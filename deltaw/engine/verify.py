"""Does this run, on this machine, go on exactly, and is every file of it what was saved? Shown by doing it.

Some of its steps are taken again: straight, and with a checkpoint written, read back and loaded in between. Both must
end in the same bits, and give the losses that the run's log has. Nothing in the run folder is changed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from deltaw.adapter import read_adapter, write_adapter
from deltaw.data.prepare import DataSet
from deltaw.engine.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from deltaw.engine.clock import WrittenClock
from deltaw.engine.log import read_metrics
from deltaw.engine.loop import Clock, Progress, StepRecord, fit
from deltaw.engine.prepare import prepare_run, sketch_run
from deltaw.engine.run import ENDED, Run
from deltaw.engine.train import Trainer
from deltaw.engine.watcher import Watcher
from deltaw.errors import AdapterError, UsageError

REPEATED = ("loss", "lr", "grad_norm", "tokens")
Check = dict[str, Any]


def verify(run: Run, watcher: Watcher, steps: int = 3) -> list[Check]:
    """What was checked: dicts of `what`, `ok` and `detail`.

    Raises UsageError while another process trains the run, and where no step was taken yet.
    """
    with run.locked():
        checks = _files(run)
        if not checks and not run.has_steps():
            raise UsageError(f"{run.folder} has taken no step yet, so there is nothing to verify.")
        settings = run.settings()
        sketch = sketch_run(run, settings, watcher)
        trainer = Trainer(run, settings, prepare_run(sketch, settings, watcher), watcher)
        good = [path for path in list_checkpoints(run.checkpoints) if _read(path) is not None]
        stored = {part.store.stem: (name, part) for name, part in reversed(trainer.ready.data.items())}
        checks += [_check(f"tokens of the {name} data", partial(_same_tokens, part)) for name, part in stored.values()]
        if good:
            checks.append(
                _check(
                    "base, data, settings and way of computing are those of the run",
                    partial(_same_sources, trainer, good[0]),
                )
            )
        if good and run.read_summary().get("status") in ENDED:
            same = partial(_same_adapters, trainer, good)
            checks.append(_check("the adapters are those of the last checkpoint", same))
        logged = {line["step"]: line for line in read_metrics(run.metrics) if "loss" in line}
        for name, begin in _beginnings(_State.of(trainer), good, logged):
            checks.append(_check(f"{name}: repeated, and resumed", partial(_repeat, trainer, begin, logged, steps)))
        return checks


def _check(what: str, do: Callable[[], str]) -> Check:
    try:
        return {"what": what, "ok": True, "detail": do()}
    except (ValueError, KeyError, OSError) as error:
        return {"what": what, "ok": False, "detail": str(error)}


def _files(run: Run) -> list[Check]:
    checkpoints = list_checkpoints(run.checkpoints)
    folders = [folder for folder in (run.adapter, run.last) if folder.exists()]
    return [_check(f"checkpoints/{path.name}", partial(_checkpoint, path)) for path in checkpoints] + [
        _check(f"{folder.name}/", partial(_adapter, folder)) for folder in folders
    ]


def _checkpoint(path: Path) -> str:
    return f"checksum right, step {read_checkpoint(path)[1]['step']}"


def _adapter(folder: Path) -> str:
    return f"{read_adapter(folder).parameters:,} parameters, as saved"


def _read(path: Path) -> tuple[Any, dict[str, Any]] | None:
    try:
        return read_checkpoint(path)
    except (ValueError, OSError, KeyError):
        return None


def _same_sources(trainer: Trainer, newest: Path) -> str:
    trainer.require_same(read_checkpoint(newest)[1])
    return "digests equal"


def _same_tokens(data: DataSet) -> str:
    """Token files are found by what was read into them, so what they hold is computed once more."""
    digest, store = data.store.digest(), data.store
    if digest != data.stored_digest:
        raise AdapterError(f"{store.stem}.* hold other tokens than were written there; remove {store.stem.parent}")
    return f"{len(store):,} documents, sha256 {digest[:12]}"


def _same_adapters(trainer: Trainer, good: list[Path]) -> str:
    """A run that has ended left its last factors and its best ones, both of which its newest checkpoint holds."""
    tensors, state = read_checkpoint(good[0])
    if state["step"] != trainer.run.read_summary().get("steps"):
        raise AdapterError("no good checkpoint of the last step is left that could tell")
    best = tensors.get("best", tensors["master"])
    for folder, values in ((trainer.run.last, tensors["master"]), (trainer.run.adapter, best)):
        with tempfile.TemporaryDirectory() as made:
            wanted = read_adapter(write_adapter(trainer.flat.adapter(0, values), Path(made) / "adapter"))
        held, wanted_held = ({(n, part): t for n, part, t in each.tensors()} for each in (read_adapter(folder), wanted))
        if held.keys() != wanted_held.keys() or not all(held[key].equal(wanted_held[key]) for key in held):
            raise AdapterError(f"{folder.name}/ is not what {good[0].name} holds")
    return f"best of step {state['best_step'] or state['step']}, last of step {state['step']}"


class _State:
    """Where a trainer stands, so that it can be put back there."""

    def __init__(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self.tensors, self.state = tensors, state

    @classmethod
    def of(cls, trainer: Trainer) -> _State:
        """The trainer's present state, copied."""
        return cls({name: tensor.clone() for name, tensor in trainer.flat.state().items()}, trainer.state())

    def put_back(self, trainer: Trainer) -> None:
        """Sets the trainer to this state."""
        trainer.take(self.tensors, self.state)

    def digest(self) -> str:
        """sha256 over all tensors."""
        tensors = ((name, tensor.cpu().contiguous()) for name, tensor in sorted(self.tensors.items()))
        parts = (name.encode() + tensor.numpy().tobytes() for name, tensor in tensors)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _beginnings(start: _State, good: list[Path], logged: dict[int, Any]) -> list[tuple[str, _State]]:
    """From where steps are repeated: the beginning, and the oldest checkpoint that has logged steps behind it."""
    found = [("the first steps", start)] if 1 in logged else []
    for path in reversed(good):
        tensors, state = read_checkpoint(path)
        if state["step"] + 1 in logged:
            return [*found, (f"the steps behind {path.name}", _State(tensors, state))]
    return found


def _repeat(trainer: Trainer, begin: _State, logged: dict[int, Any], steps: int) -> str:
    """Takes the steps twice from one state and compares; ValueError says where they part."""
    first = begin.state["step"] + 1
    count = sum(1 for step in range(first, first + steps) if step in logged)
    straight, records = _take(trainer, begin, count)
    for record in records:
        line = logged[record.step]
        now = (record.losses[0], record.rates[0], record.grad_norms[0], record.tokens[0])
        different = [name for name, value in zip(REPEATED, now, strict=True) if line[name] != value]
        if different:
            raise AdapterError(f"step {record.step} differs from the log in {', '.join(different)}")
    middle, _ = _take(trainer, begin, count // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), 0, {k: v.cpu() for k, v in middle.tensors.items()}, middle.state, 1)
        middle = _State(*read_checkpoint(path))
    resumed, _ = _take(trainer, middle, count - count // 2)
    if resumed.digest() != straight.digest():
        raise AdapterError("straight and resumed end in different bits")
    return f"steps {first} to {first + count - 1}, sha256 {straight.digest()[:12]}"


def _take(trainer: Trainer, begin: _State, count: int) -> tuple[_State, list[StepRecord]]:
    """The state, and what was logged, `count` steps behind a state."""
    begin.put_back(trainer)
    records: list[StepRecord] = []

    def observe(record: StepRecord, _progress: Progress) -> bool:
        records.append(record)
        return len(records) < count

    clock: Clock | None = WrittenClock(trainer.run.clock) if trainer.length.seconds is not None else None
    if count:
        fit(trainer.ready.base, trainer.injection, trainer.flat, trainer.progress, trainer.length, observe, clock=clock)
    return _State.of(trainer), records
