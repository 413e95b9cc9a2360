"""What rank a task needed, measured from one trained adapter: held-out loss against rank, by exact truncation.

The adapter is cut to ranks 1, 2, 4 … r, each cut is measured on the same documents over one open base, and what is
left of the gain in loss is given with an interval (deltaw/analysis/curve.py). Nothing is trained.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.adapter import Adapter, read_adapter
from deltaw.analysis.curve import Curve, Needed, half_of, retained_gain
from deltaw.analysis.spectrum import ranks_of, spectra
from deltaw.analysis.truncate import Spectra, ranks_within, truncate
from deltaw.api import EVALUATION_TOKENS, Model, open_adapter
from deltaw.config import AUTO, Reading, parted
from deltaw.data.formats import parse_sources
from deltaw.data.prepare import prepare
from deltaw.engine.heldout import HeldOut, Progress
from deltaw.engine.orders import by_activations, by_loss, require_plain
from deltaw.engine.prepare import Sketch, prepare_run, sketch_run
from deltaw.engine.run import Run, adapter_folder, run_of
from deltaw.engine.watcher import Watcher
from deltaw.errors import UsageError

# What measuring may take: this share of the run's training time, or so many seconds where no run tells.
TIME_SHARE, USUAL_SECONDS = 0.15, 60.0
SHARES = (0.95, 0.99)
# Documents that order directions are others than those that judge them: this share of all that are given.
ORDERING_SHARE, MOST_ORDERING = 0.25, 64


def rank(
    path: str | Path,
    data: Sequence[str | Path] = (),
    model: str | None = None,
    *,
    everything: bool = False,
    seconds: float | None = None,
    orders: bool = False,
    ranks: Sequence[int] = (),
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The retained-gain curve of an adapter or run folder on held-out data, and the rank that it says was needed.

    Without `data`, what the run held out itself serves, which chose its best adapter too. As many documents as fit into
    `seconds` (default: 15 % of the run's training time) are measured, all of them with `everything`. `ranks` (default:
    powers of two) are measured beside half of the adapter's and all of it. `orders` compares ways to choose directions
    at equal numbers of parameters. Options are those of `evaluate`. Returns `points` (rank, numbers, loss, gain, low,
    high), `needed` at 95 and 99 % of the gain, `verdict`, what it is based on, and `by_document`: sums of losses, the
    base's first. Raises DataError and AdapterError as `evaluate` does, and UsageError where there is nothing to
    measure, or nothing to measure on.
    """
    since = time.monotonic()
    adapter = read_adapter(adapter_folder(path))
    if orders:
        require_plain(adapter)
    known = spectra(adapter)
    ladder = ladder_of(known, ranks)
    with tempfile.TemporaryDirectory() as folder:
        held_out = open_held_out(path, data, model, Path(folder), say, **options)
        ordering = _set_apart(held_out) if orders else 0
        if not everything:
            allowed = seconds if seconds is not None else allowed_seconds(Path(path))
            most = held_out.documents
            held_out.fit_into(allowed, adapter, (1 + 4 * orders) * (len(ladder) + 1))
            held_out.documents = min(most, held_out.documents)
        cuts = [cut(adapter, known, size) for size in ladder]
        losses_KD = held_out.curve_losses([None, *cuts], progress)
        curve = retained_gain(losses_KD[0], losses_KD[1:], held_out.tokens_D, ladder)
        result = {**_as_dict(curve, cuts), **_facts(adapter, known, held_out, ordering)}
        result["by_document"] = {"tokens": held_out.tokens_D.tolist(), "losses": losses_KD.tolist()}
        least, most = result["ranks"].values()
        if least != most and curve.improves:
            result["verdict"] = (
                f"Undetermined: layers have ranks from {least} to {most}, and half of {most} cuts larger ones alone. "
                "The curve says what each cut keeps."
            )
        if orders:
            result["orders"] = _compare_orders(held_out, adapter, known, ladder, losses_KD, ordering, progress)
        return {**result, "seconds": time.monotonic() - since}


def open_held_out(
    path: str | Path,
    data: Sequence[str | Path],
    model: str | None,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> HeldOut:
    """The base of an adapter, without it, and held-out documents encoded as the adapter's were; tokens in `folder`.

    Without `data`, those that the run held out. UsageError when it held out none, its data changed, or there is no run.
    """
    read, machine = parted(options)
    if not data:
        if given := [f"--{name.replace('_', '-')}" for name in Reading._fields if options.get(name)]:
            raise UsageError(f"Of how --data FILE is read: {', '.join(given)}; give --data too, or leave that out.")
        return _of_run(Path(path), say, {**machine, **({} if model is None else {"model": model})})
    opened: Model = open_adapter(path, model, say, **machine)
    assert opened.injection is not None
    opened.injection.eject()
    sources = parse_sources(data, read.columns)
    prepared = prepare(sources, opened.encoder(read), folder, refuse_above=read.allow_lost)
    return HeldOut(opened.base, prepared.store, EVALUATION_TOKENS)


def _of_run(path: Path, say: Callable[[str], None], options: dict[str, Any]) -> HeldOut:
    run = run_of(path)
    if run is None:
        raise UsageError(f"{path} is no run, so nothing was held out; give --data FILE.")
    settings = run.settings()
    for name in ("device", "dtype"):  # the run may be of another machine
        if not settings.asked_for(name):
            settings.put(name, AUTO, "default")
    by_memory = not settings.asked_for("stream") and "stream" not in options
    for name, value in options.items():
        settings.put(name, value, "given")
    sketch = sketch_run(run, settings, Watcher())
    if "eval" not in sketch.data:
        raise UsageError(f"The run {path} held nothing out; give --data FILE.")
    if _is_other_data(run, sketch):
        raise UsageError(f"What {path} held out would be other rows now; give ones it has not seen with --data FILE.")
    say("Measuring on what the run held out for validation.")
    if by_memory:
        settings.put("stream", AUTO, "rule: where the memory does not suffice")
    return HeldOut(prepare_run(sketch, settings, Watcher()).base, sketch.data["eval"].store, EVALUATION_TOKENS)


def _is_other_data(run: Run, sketch: Sketch) -> bool:
    """Whether what is held out now may be other rows: by the summary, or by what the adapter was trained on."""
    known = run.read_summary().get("data", {}).get("eval", {}).get("digest")
    if known is not None or run.settings().eval_data:
        return known not in (None, sketch.data["eval"].report.digest)
    trained_on = read_adapter(run.adapter).origin.get("data_digest")
    return trained_on not in (None, sketch.data["train"].report.digest)


def allowed_seconds(path: Path) -> float:
    """How long measuring may take, by the training time of the run that the adapter lies in."""
    run = run_of(path)
    trained = None if run is None else run.read_summary().get("train_seconds")
    return TIME_SHARE * trained if trained else USUAL_SECONDS


def ladder_of(known: Spectra, asked: Sequence[int] = ()) -> list[int]:
    """1, 2, 4 … or the ranks `asked` for, half the highest rank that a layer has, and that one. Raises UsageError."""
    highest = max(found.sigma_K.shape[-1] for found in known.values())
    if wrong := [rank for rank in asked if not 1 <= rank <= highest]:
        raise UsageError(f"This adapter can be cut to ranks from 1 to {highest}, not to {', '.join(map(str, wrong))}.")
    powers = (2**power for power in range((highest - 1).bit_length()))
    return sorted({*(asked or powers), half_of(highest), highest})


def cut(adapter: Adapter, known: Spectra, size: int) -> Adapter:
    """Every layer's best approximation of this rank; a layer of lower rank keeps what it has."""
    ranks: dict[str, int] = {}
    for name, found in known.items():
        key = adapter.pattern_name(name)
        ranks[key] = max(ranks.get(key, 1), min(size, found.sigma_K.shape[-1]))
    return truncate(adapter, {name: ranks[adapter.pattern_name(name)] for name in known}, known)


def _as_dict(curve: Curve, cuts: Sequence[Adapter]) -> dict[str, Any]:
    points = [{**point._asdict(), "numbers": made.parameters} for point, made in zip(curve.points, cuts, strict=True)]
    return {
        "points": points,
        "base_loss": curve.base_loss,
        "improvement": dict(zip(("nats", "low", "high"), curve.improvement, strict=True)),
        "improves": curve.improves,
        "needed": [_needed(curve.needed(share)) for share in SHARES],
        "verdict": curve.verdict(),
    }


def _needed(found: Needed) -> dict[str, Any]:
    return {**found._asdict(), "determined": found.determined}


def _facts(adapter: Adapter, known: Spectra, held_out: HeldOut, ordering: int) -> dict[str, Any]:
    """What the curve stands on, and for comparison what the spectra alone would say."""
    found = [ranks_of(each.sigma_K) for each in known.values()]
    means = {name: float(np.mean([getattr(ranks, name) for ranks in found])) for name in found[0].__dict__}
    ranks = [adapter.rank_of(name) for name in known]
    return {
        "rank": max(ranks),
        "ranks": {"least": min(ranks), "most": max(ranks)},
        "documents": held_out.documents,
        "documents_given": held_out.given,
        "documents_for_ordering": ordering,
        "tokens": held_out.tokens,
        "spectra": means,
    }


# -- orders ------------------------------------------------------------------------------------------------------------


def _set_apart(held_out: HeldOut) -> int:
    """Keeps the last documents of the sample for ordering; how many."""
    count = min(MOST_ORDERING, int(ORDERING_SHARE * held_out.given))
    if not count:
        raise UsageError(f"--orders needs more documents than {held_out.given}: some order, others judge.")
    held_out.documents = held_out.given - count
    return count


def _compare_orders(
    held_out: HeldOut, adapter: Adapter, known: Spectra, ladder: list[int], losses_KD: np.ndarray, ordering: int,
    progress: Progress | None,
) -> dict[str, list[dict[str, float]]]:  # fmt: skip
    """Retained gain by rank for each order; of those that choose ranks layer by layer, at as many numbers."""
    total = held_out.given
    batches = held_out.batches(total - ordering, total)
    by_input = by_activations(held_out.base, adapter, batches)
    by_gate, worth = by_loss(held_out.base, adapter, known, batches)
    numbers = {size: cut(adapter, known, size).parameters for size in ladder}  # of the first order, and so of all
    whole, shown = losses_KD[-1:], {}
    for title, made in (
        ("plain σ, the same rank everywhere", None),
        ("plain σ over all layers", lambda size: truncate(adapter, ranks_within(adapter, known, numbers[size]), known)),
        ("activation-weighted σ", lambda size: cut(adapter, by_input, size)),
        ("loss sensitivity", lambda size: truncate(adapter, ranks_within(adapter, worth, numbers[size]), by_gate)),
    ):
        if made is None:
            found = losses_KD[1:]
        else:
            cuts = [made(size) for size in ladder[:-1]]
            found = np.concatenate([held_out.curve_losses(cuts, progress), whole]) if cuts else whole
        curve = retained_gain(losses_KD[0], found, held_out.tokens_D, ladder)
        shown[title] = [dict(point._asdict()) for point in curve.points]
    return shown
