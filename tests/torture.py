"""Kills, failing disks, flipped bits and NaNs against a small real run; prints what came of it as one line of JSON.

A server imports everything once and forks a child for every attempt, so that hundreds fit in minutes. An attempt is a
training run of the tiny base, killed or sabotaged, and gone on with until it ends; then every byte that matters must
equal the run that nobody disturbed. Usage: python tests/torture.py KIND COUNT [SEED], KIND one of the keys of KINDS.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from models import save_base

from deltaw.base.proof import prepare_passes
from deltaw.config import make_settings
from deltaw.engine import train as engine
from deltaw.engine.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint
from deltaw.engine.log import read_metrics
from deltaw.engine.run import create_run, open_run
from deltaw.engine.watcher import Watcher
from deltaw.errors import DeltawError, Interrupted, NotFiniteError

_remove = shutil.rmtree  # ours, not the one that is sabotaged
TIMES = ("seconds", "peak_bytes", "eval_seconds")
STEPS = 12
WAYS = (  # whether their bits are those of a base in memory that computes every block once, and what is asked for
    (True, {"recompute": 1}),
    (True, {"stream": True}),
    (False, {"quant": "nf4"}),
    (False, {"quant": "int8", "stream": True, "recompute": 2}),
)


class Ground:
    """A folder with a base, data, and the run that nobody disturbed."""

    def __init__(self, folder: Path, steps: int = STEPS, every: int = 2, options: dict[str, Any] | None = None) -> None:
        self.folder, self.steps, self.every, self.options = folder, steps, every, options or {}
        os.environ["DELTAW_CACHE"] = str(folder / "cache")
        prepare_passes()  # here, and not in each child
        self.base = save_base(folder / "base")
        self.data = folder / "chats.jsonl"
        rows = [
            {"prompt": " ".join(f"w{(7 * n + k) % 23}" for k in range(1 + n % 9)), "completion": f"w{n % 5}"}
            for n in range(40)
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        started = time.monotonic()
        assert self.attempt("straight") == 0, "the undisturbed run must end"
        self.seconds = time.monotonic() - started
        self.wanted = self.result("straight")

    def train(self, name: str) -> None:
        """Begins the run, or goes on with it: what a user's command does."""
        folder = self.folder / name
        if (folder / "config.yaml").is_file():
            run = open_run(folder)
            if run.read_summary().get("status") != "done":
                engine.train(run, run.settings(), Watcher(), resume=True)
            return
        _remove(folder, ignore_errors=True)
        settings = make_settings({
            "model": str(self.base), "data": [str(self.data)], "out": str(folder), "rank": 2, "targets": ["q_proj", "down_proj"],
            "dropout": 0.1, "steps": self.steps, "batch_tokens": 128, "lr": 1e-2, "eval_steps": self.every,
            "checkpoint_steps": self.every, "eval_rows": 2, "device": "cpu", "dtype": "float32", "threads": 1,
            "date": "2026-01-31",  # of the runs that are compared, some begin before midnight
            **self.options,
        })  # fmt: skip
        engine.train(create_run(settings), settings, Watcher())

    def attempt(self, name: str, before: Callable[[], None] = lambda: None, kill_after: float | None = None) -> int:
        """The exit code of a child that trains; −9 when it was killed. `before` runs in the child."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                torch.manual_seed(0)
                before()
                self.train(name)
                code = 0
            except (DeltawError, Interrupted) as error:
                code = error.exit_code
                if code == 1:
                    (self.folder / "last_error").write_text(traceback.format_exc())
            except KeyboardInterrupt:  # before training handles it, as the command line does
                code = 130
            except BaseException:
                code = 99
            finally:
                os._exit(code)
        if kill_after is not None:
            deadline = time.monotonic() + kill_after
            while time.monotonic() < deadline:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def result(self, name: str) -> dict[str, Any]:
        """Every byte that must not depend on kills: adapters, the last checkpoint's tensors, the log without clocks."""
        folder = self.folder / name
        files = {
            f"{part}/{file.name}": file.read_bytes()
            for part in ("adapter", "last")
            for file in (folder / part).iterdir()
        }
        tensors, state = read_checkpoint(list_checkpoints(folder / "checkpoints")[0])
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]
        numbers = {key: value.numpy().tobytes() for key, value in tensors.items()}
        return {
            "files": files,
            "tensors": numbers,
            "state": {k: v for k, v in state.items() if k != "seconds"},
            "lines": lines,
        }

    def finish(self, name: str) -> str:
        """Goes on until the run ends, and says how it ended: identical, different, or the exit code of a failed resume."""
        code = self.attempt(name)
        if code:
            return f"resume failed with {code}"
        outcome = "identical" if self.result(name) == self.wanted else "different"
        shutil.rmtree(self.folder / name)
        return outcome


def kills(ground: Ground, count: int, random_: random.Random) -> dict[str, Any]:
    """`kill -9` at any time, up to three times a run."""
    done, outcomes, number = 0, [], 0
    while done < count:
        name, number, before = f"run-{number}", number + 1, done
        for _ in range(random_.randint(2, 3)):
            code = ground.attempt(name, kill_after=random_.uniform(0, 0.9 * ground.seconds))
            done += code == -9
            if code == 0:
                break
            assert code == -9, code
        outcome = ground.finish(name)
        if done > before:
            outcomes.append(outcome)
    return {"kills": done, "runs": len(outcomes), **_counts(outcomes)}


def ways(ground: Ground, count: int, random_: random.Random) -> dict[str, Any]:
    """Kills of runs whose base is streamed or quantised or computes blocks again; the exact ways end as plain runs do."""
    import bitsandbytes  # noqa: F401  (a second or two in every child otherwise)

    found, as_plain = [], 0
    for number, (exact, options) in enumerate(WAYS):
        there = Ground(ground.folder / f"way-{number}", ground.steps, ground.every, options)
        found.append(kills(there, -(-count // len(WAYS)), random_))
        as_plain += exact and there.wanted["tensors"] == ground.wanted["tensors"]
    others = sorted({other for one in found for other in one["others"]})
    total = {name: sum(one[name] for one in found) for name in ("kills", "runs", "identical")}
    return {**total, "others": others, "ways": len(WAYS), "as_plain": as_plain}


def _at_operation(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Counts what a save does to files, and acts before the given one."""

    def install() -> None:
        seen = 0

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == number:
                    act()
                return original(*arguments, **options)

            return call

        os.fsync = counted(os.fsync)
        for name in ("replace", "rename", "unlink", "mkdir", "write_text", "open"):
            setattr(Path, name, counted(getattr(Path, name)))
        shutil.rmtree = counted(shutil.rmtree)

    return install


def cuts(ground: Ground, count: int, _random: random.Random) -> dict[str, Any]:
    """Death at the 1st, 2nd, … operation on files, until a run needs no more of them (or `count` are done)."""
    outcomes = []
    for number in range(1, count + 1):
        code = ground.attempt("cut", _at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        if code == 0:
            shutil.rmtree(ground.folder / "cut")
            break
        assert code == -9, code
        outcomes.append(ground.finish("cut"))
    return {"cuts": len(outcomes), **_counts(outcomes)}


def faults(ground: Ground, count: int, random_: random.Random) -> dict[str, Any]:
    """A failing operation (full, I/O error, quota, too many files, read-only): exit code 5, and resume works afterwards."""
    kinds = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.EROFS)
    outcomes, codes = [], []
    for number in range(1, count + 1):

        def fail(kind: int = random_.choice(kinds)) -> None:
            raise OSError(kind, os.strerror(kind))

        code = ground.attempt("fault", _at_operation(number, fail))
        if code == 0 and ground.result("fault") == ground.wanted and not _acted(ground, number):
            shutil.rmtree(ground.folder / "fault")
            break
        codes.append(code)
        good = newest_checkpoint(ground.folder / "fault" / "checkpoints")[0] is not None
        started = (ground.folder / "fault" / "checkpoints").is_dir() and any(
            list_checkpoints(ground.folder / "fault" / "checkpoints")
        )
        assert good or not started, "no good checkpoint is left"
        outcomes.append(ground.finish("fault"))
    return {
        "faults": len(outcomes),
        "exit_codes": {str(c): codes.count(c) for c in sorted(set(codes))},
        **_counts(outcomes),
    }


def _acted(ground: Ground, number: int) -> bool:
    """Whether a run reaches this operation at all."""
    code = ground.attempt("probe", _at_operation(number, lambda: os._exit(77)))
    shutil.rmtree(ground.folder / "probe", ignore_errors=True)
    return code == 77


def flips(ground: Ground, count: int, random_: random.Random) -> dict[str, Any]:
    """Single flipped bits and truncations of a checkpoint: each must be found."""
    folder = ground.folder / "straight" / "checkpoints"
    newest, older = list_checkpoints(folder)[:2]
    content, found, fell_back = newest.read_bytes(), 0, 0
    for number in range(count):
        damaged = bytearray(content)
        if number % 5 == 4:
            del damaged[random_.randrange(len(damaged)) :]
        else:
            damaged[random_.randrange(len(damaged))] ^= 1 << random_.randrange(8)
        newest.write_bytes(damaged)
        state, skipped = newest_checkpoint(folder)
        found += len(skipped) == 1
        fell_back += state is not None and state[1]["step"] == read_checkpoint(older)[1]["step"]
    newest.write_bytes(content)
    return {"flips": count, "found": found, "fell_back": fell_back}


def signals(ground: Ground, count: int, random_: random.Random) -> dict[str, Any]:
    """SIGTERM and SIGINT at random times while it trains: exit within five seconds, resume exact."""
    outcomes, waits, codes = [], [], []
    for number in range(count):
        name, which = f"signal-{number}", random_.choice((signal.SIGTERM, signal.SIGINT))
        after = random_.uniform(0.3, 0.9) * ground.seconds

        def press(which: int = which, after: float = after) -> None:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), which))
            signal.setitimer(signal.ITIMER_REAL, after)

        started = time.monotonic()
        codes.append(ground.attempt(name, press))
        waits.append(time.monotonic() - started - after)
        outcomes.append(ground.finish(name))
    counted = {str(code): codes.count(code) for code in sorted(set(codes))}
    error = ground.folder / "last_error"
    return {
        "signals": count,
        "exit_codes": counted,
        "longest_seconds": max(waits),
        "last_error": error.read_text() if error.is_file() else None,
        **_counts(outcomes),
    }


# The rows of the batch, or where else it was.
_NAMED = re.compile(r"The batch held .*row \d|factors are not finite|validation loss")


def nans(ground: Ground, count: int, random_: random.Random) -> dict[str, Any]:
    """NaN or infinity in a factor, gradient, activation or loss at a random step: stopped, and in no file."""
    stopped = clean = named = 0
    for number in range(count):
        folder, at = ground.folder / f"nan-{number}", random_.randrange(1, STEPS)
        where, bad = random_.choice(("factor", "gradient", "activation", "loss")), random_.choice((math.nan, math.inf))
        settings = make_settings({
            "model": str(ground.base), "data": [str(ground.data)], "out": str(folder), "rank": 2, "steps": STEPS,
            "batch_tokens": 128, "eval_steps": 3, "checkpoint_steps": 2, "eval_rows": 2, "device": "cpu", "dtype": "float32",
        })  # fmt: skip
        run, last = create_run(settings), []
        try:
            engine.train(run, settings, Watcher(), before=_spoil(where, bad, at))
        except NotFiniteError as error:
            stopped += 1
            last = [line["step"] for line in read_metrics(run.metrics) if "loss" in line][-1:]
            named += bool(_NAMED.search(str(error)))
        assert not last or last[0] <= at + 1, (where, at, last)
        clean += _all_finite(folder)
        shutil.rmtree(folder)
    return {"nans": count, "stopped": stopped, "clean": clean, "named": named}


def _spoil(where: str, bad: float, at: int) -> Callable[[engine.Trainer], None]:
    def before(trainer: engine.Trainer) -> None:
        step = trainer.progress
        layer = next(iter(trainer.injection.layers[0].values()))
        if where == "factor":
            trainer.flat.optimizer.register_step_post_hook(
                lambda *_: trainer.flat.master[:1].fill_(bad) if step.step + 1 == at else None
            )
        elif where == "gradient":
            layer.A.register_hook(lambda grad: grad * bad if step.step + 1 == at else grad)
        else:
            owner = layer.target.owner if where == "activation" else trainer.ready.base.model.get_output_embeddings()
            owner.register_forward_hook(lambda _m, _x, out: out * bad if step.step + 1 == at else out)

    return before


def _all_finite(folder: Path) -> bool:
    import safetensors.torch

    tensors = [t for file in folder.rglob("*.safetensors") for t in safetensors.torch.load_file(file).values()]
    tensors += [t for path in list_checkpoints(folder / "checkpoints") for t in read_checkpoint(path)[0].values()]
    logged = [value for line in read_metrics(folder / "metrics.jsonl") for value in line.values()]
    numbers_finite = all(math.isfinite(value) for value in logged if isinstance(value, float))
    return numbers_finite and all(bool(tensor.isfinite().all()) for tensor in tensors)


def _counts(outcomes: list[str]) -> dict[str, Any]:
    return {"identical": outcomes.count("identical"), "others": sorted({o for o in outcomes if o != "identical"})}


KINDS: dict[str, tuple[Callable[..., dict[str, Any]], int, int]] = {
    "kills": (kills, STEPS, 2),
    "ways": (ways, STEPS, 2),
    "cuts": (cuts, 2, 1),
    "faults": (faults, 2, 1),
    "flips": (flips, 4, 1),
    "signals": (signals, STEPS, 2),
    "nans": (nans, 2, 1),
}


def main(kind: str, count: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    act, steps, every = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        found = act(Ground(Path(folder), steps, every), count, random.Random(seed))
        print(json.dumps({"kind": kind, **found, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:]))
