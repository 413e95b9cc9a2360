"""Training in one call: a new run, an old one gone on with, or one whose rank is measured when it has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaw.api import train_run
from deltaw.compression import compress
from deltaw.config import AUTO, Settings
from deltaw.demonstration import train_demo
from deltaw.disk import write_text
from deltaw.engine.run import ENDED, Run, create_run, open_run
from deltaw.engine.watcher import Watcher
from deltaw.errors import UsageError, command
from deltaw.planning import one_of
from deltaw.ranks import rank as rank_of

MEASURED = "train --rank measure"  # in the summary of a run whose rank is measured when it has ended
# The gain that a rank must keep to be chosen, and how long what was cut is trained again.
MEASURED_SHARE, HEALED_SHARE = 0.99, 0.1


def train(
    settings: Settings | None = None,
    run: Run | None = None,
    watcher: Watcher | None = None,
    *,
    resume: str | Path | None = None,
    **given: Any,
) -> Run:
    """Trains an adapter and returns its run folder. Settings as keywords: model, data, rank, steps, lr, …

    `resume` names a run folder to go on with instead. Raises the errors of deltaw.errors; Interrupted after a signal.
    """
    watcher = watcher or Watcher()
    if resume is not None:
        if given or settings is not None:
            raise UsageError("A resumed run keeps its own settings; give `resume` alone.")
        return _resume(open_run(Path(resume)), watcher)
    settings = one_of(settings, given)
    run = run or create_run(settings)
    train_run(run, settings, watcher, "train")
    return run


def _resume(run: Run, watcher: Watcher) -> Run:
    """The run, gone on with as what it was begun as."""
    known = run.read_summary()
    if known.get("verb") == MEASURED:
        resume_measured(run, watcher)
    elif known.get("status") in ENDED:
        watcher.say(f"{run.folder} has ended already; nothing is left to do.")
    elif known.get("verb") == "sweep":
        whole = command(f"sweep --resume {run.folder.parent}")
        raise UsageError(f"{run.folder} is a part of a sweep; go on with: {whole}")
    elif known.get("verb") == "demo":
        train_demo(run, run.settings(), watcher, resume=True)
    else:
        train_run(run, run.settings(), watcher, "train", resume=True)
    return run


# -- with the rank measured --------------------------------------------------------------------------------------------


def train_measured(settings: Settings, watcher: Watcher | None = None) -> dict[str, Any]:
    """`--rank measure`: trains at the default rank, measures what rank was needed, cuts to it and heals.

    Returns the run (`run`), the measurement (`measured`, also in rank.json) and, where a smaller rank is sure to keep
    99 % of the gain, what `compress` returns for the adapter in the run's folder `compressed`; else None. Both are None
    where the data was too little to hold anything out.
    """
    watcher = watcher or Watcher()
    settings.put("rank", AUTO, "measure: the default rank first")
    run = create_run(settings)
    train_run(run, settings, watcher, MEASURED)
    return _measured(run, watcher)


def resume_measured(run: Run, watcher: Watcher) -> dict[str, Any]:
    """Goes on with a run of `train_measured`, whichever part of it was stopped."""
    if run.read_summary().get("status") not in ENDED:
        train_run(run, run.settings(), watcher, MEASURED, resume=True)
    return _measured(run, watcher)


def _measured(run: Run, watcher: Watcher) -> dict[str, Any]:
    """What follows training: the measurement, and what it says to make. Both stay as they are where they are made."""
    measurement, compressed = run.folder / "rank.json", run.folder / "compressed"
    if "eval" not in run.read_summary()["data"]:
        watcher.say("Nothing was held out, so no rank can be measured; give --eval-data.")
        return {"run": str(run.folder), "measured": None, "compressed": None}
    if not measurement.is_file():
        found = rank_of(run.folder, everything=True, say=watcher.say)
        write_text(measurement, json.dumps(found, indent=2) + "\n")
    found = json.loads(measurement.read_text("utf-8"))
    watcher.say(f"{found['verdict']} The curve is in {measurement}.")
    need = next(need for need in found["needed"] if need["share"] == MEASURED_SHARE)
    made = None
    settings = run.settings()
    if need["determined"] and need["high"] < found["points"][-1]["rank"] and not compressed.exists():
        steps = max(1, round(HEALED_SHARE * int(run.read_summary()["steps"])))
        made = compress(
            run.folder, compressed, rank=need["high"], heal=steps, train_data=settings.data,
            watcher=watcher, say=watcher.say, device=settings.device,
        )  # fmt: skip
        watcher.say(f"The adapter of rank {need['high']} is in {compressed}.")
    return {"run": str(run.folder), "measured": found, "compressed": made}
