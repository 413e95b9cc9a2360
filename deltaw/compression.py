"""An adapter of other ranks from one adapter, and what that costs in held-out loss."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deltaw.adapter import Adapter, Factors, read_adapter, write_adapter
from deltaw.adapter.files import WEIGHTS, to_keys
from deltaw.analysis.curve import Curve, retained_gain
from deltaw.analysis.spectrum import spectra
from deltaw.analysis.truncate import (
    Spectra,
    component_numbers,
    discarded_energy,
    magnitudes,
    ranks_within,
    truncate,
    uniform_ranks,
)
from deltaw.api import base_of, train_run
from deltaw.config import make_settings, parse_bytes, parted
from deltaw.disk import require_new
from deltaw.engine.heldout import HeldOut, Progress
from deltaw.engine.run import adapter_folder, create_run, run_of
from deltaw.engine.watcher import Watcher
from deltaw.errors import AdapterError, Interrupted, UsageError
from deltaw.ranks import open_held_out

Say = Callable[[str], None]
# Sizes that --keep tries, in a search for the smallest: halvings of the range on a logarithmic scale.
TRIED = 8
HEADER_BYTES = 64  # of an adapter's file, beside names and places of its tensors


def compress(
    path: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    budget: str | None = None,
    data: Sequence[str | Path] = (),
    heal: int | None = None,
    train_data: Sequence[str | Path] = (),
    model: str | None = None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
    watcher: Watcher | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes an adapter of other ranks to `out`, each layer the best of its rank; returns what that cost.

    Exactly one of `rank` (the same everywhere; a higher one is exact), `budget` (bytes of the file, such as "2MB") and
    `keep` (the share of the gain in held-out loss that must be kept, by the lower end of its interval) decides; the
    latter two choose ranks layer by layer. With `data` the held-out loss is measured before and after, and `keep` needs
    it; without, no base is opened. `heal` trains the result for so many steps on `train_data`. The dtype stays.
    Options: those of `evaluate`.
    Raises UsageError, AdapterError or DataError, and writes nothing then.
    """
    if [rank, keep, budget].count(None) != 2:
        raise UsageError("Give one of --rank, --keep and --budget.")
    if keep is not None and not (data and 0 < keep <= 1):
        raise UsageError("--keep is a share of the held-out gain, above 0 and at most 1, and needs --data FILE.")
    if (heal is None) != (not train_data):
        raise UsageError("--heal STEPS and --train-data FILE belong together.")
    require_new(Path(out))
    adapter = read_adapter(adapter_folder(path))
    numbers = None if budget is None else _numbers_in(adapter, budget)
    known = spectra(adapter)
    with tempfile.TemporaryDirectory() as folder:
        held_out = None
        if data:
            held_out = open_held_out(path, data, model, Path(folder), say, **options)
        before = np.zeros(0) if held_out is None else held_out.curve_losses([None, adapter])
        if rank is not None:
            ranks = uniform_ranks(adapter, rank)
        elif numbers is not None:
            ranks = ranks_within(adapter, known, numbers)
        else:
            assert held_out is not None and keep is not None
            ranks = _smallest_that_keeps(adapter, known, held_out, before, keep, progress)
        made = truncate(adapter, ranks, known)
        if heal is not None:
            name = model or base_of(Path(path), adapter)
            alike = _healed_alike(Path(path), adapter, options)
            made = _healed(made, name, heal, train_data, Path(folder), watcher or Watcher(), alike)
        measured = {} if held_out is None else _before_and_after(held_out, before, made)
    write_adapter(made, Path(out))
    return {
        "folder": str(out),
        "variant": _what_became(adapter),
        "one_scale": made.spec.one_scale,
        "ranks": {"least": min(ranks.values()), "most": max(ranks.values())},
        "parameters": made.parameters,
        "parameters_before": adapter.parameters,
        "bytes": (Path(out) / WEIGHTS).stat().st_size,
        "discarded_energy": discarded_energy(known, ranks),
        "chosen_by_gain": keep is not None,
        **measured,
    }


def _what_became(adapter: Adapter) -> str:
    if adapter.spec.dora:
        return "DoRA: its magnitudes are kept, since what they do to W has no low rank"
    return "plain LoRA, alpha = rank"


def _least_numbers(adapter: Adapter) -> int:
    """How many numbers rank 1 in every layer takes."""
    return sum(component_numbers(adapter, name) for name in adapter.factors) + magnitudes(adapter)


def _numbers_in(adapter: Adapter, budget: str) -> int:
    """How many numbers fit into a file of this size beside its header. UsageError when that is too few, or no size."""
    try:
        size = parse_bytes(budget)
    except ValueError as error:
        raise UsageError(f"--budget {error}, not {budget!r}.") from error
    tensors = to_keys(adapter)
    header, each = _header_bytes(tensors), max(tensor.element_size() for tensor in tensors.values())
    least = header + each * _least_numbers(adapter)
    if size < least:
        raise UsageError(f"--budget {budget}: rank 1 in every layer takes {-(-least // 1000)}KB already.")
    return (size - header) // each


def _header_bytes(tensors: dict[str, Tensor]) -> int:
    """What names and places of tensors take in their file, at most."""
    whole = sum(tensor.nbytes for tensor in tensors.values())
    entries = {
        name: {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [whole, whole]}
        for name, tensor in tensors.items()
    }
    return HEADER_BYTES + len(json.dumps(entries))


def _smallest_that_keeps(
    adapter: Adapter,
    known: Spectra,
    held_out: HeldOut,
    before: np.ndarray,
    keep: float,
    progress: Progress | None,
) -> dict[str, int]:
    """The ranks of the fewest numbers, to a twentieth or so, whose retained gain is surely at least `keep`."""
    least = _least_numbers(adapter)
    low, high = least, adapter.parameters
    best = {name: found.sigma_K.shape[-1] for name, found in known.items()}
    for number in range(TRIED):
        if progress is not None:
            progress(number, TRIED)
        middle = least if number == 0 else round((low * high) ** 0.5)
        ranks = ranks_within(adapter, known, middle)
        losses = held_out.losses(truncate(adapter, ranks, known))
        curve = _curve(held_out, before, losses)
        if number == 0 and not curve.improves:
            raise AdapterError(curve.verdict() + " So none can be kept; give --rank or --budget.")
        if curve.points[0].low >= keep:
            best, high = ranks, middle
            if number == 0:
                break
        else:
            low = middle
    return best


def _curve(held_out: HeldOut, before: np.ndarray, losses: np.ndarray) -> Curve:
    """Of two points, the cut, called rank 1, and the whole; `before` are the losses of the base and of the whole."""
    return retained_gain(before[0], np.stack([losses, before[1]]), held_out.tokens_D, [1, 2])


def _before_and_after(held_out: HeldOut, before: np.ndarray, made: Adapter) -> dict[str, Any]:
    """Held-out losses, and what is kept of the gain: None where there is surely none, as `verdict` says then."""
    curve = _curve(held_out, before, held_out.losses(made))
    kept, whole = curve.points
    return {
        "loss_base": curve.base_loss,
        "loss_before": whole.loss,
        "loss_after": kept.loss,
        "retained_gain": kept.gain if curve.improves else None,
        "retained_gain_interval": [kept.low, kept.high] if curve.improves else None,
        "verdict": None if curve.improves else curve.verdict(),
        "documents": held_out.documents,
    }


# What healing does as the run did; and what suits one machine, in which it follows the run only where someone asked.
HEALED_ALIKE = ("batch_tokens", "max_length", "train_on", "columns", "allow", "allow_lost", "date", "lr", "revision")
FITTED = ("dtype", "micro_tokens", "recompute", "stream", "quant")


def _healed_alike(path: Path, adapter: Adapter, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that healing takes from the run that the adapter is of, or from what the adapter says of it.

    Options that were given win; what is put up with in the data is what either puts up with.
    """
    run = run_of(path)
    if run is None:  # nobody knows who chose them
        known, names = adapter.settings, list(HEALED_ALIKE)
    else:
        settings = run.settings()
        known, names = vars(settings), [*HEALED_ALIKE, *filter(settings.asked_for, FITTED)]
    if known.get("quant", "none") != "none":
        names.append("quant")  # the base that it was trained on
    alike = {name: known[name] for name in names if known.get(name) is not None}
    read, machine = parted(options)
    alike |= {**machine, **{name: value for name, value in read._asdict().items() if value}}
    alike["allow"] = sorted({*known.get("allow", ()), *read.allow})
    alike["allow_lost"] = max(known.get("allow_lost", 0.0), read.allow_lost)
    return alike


def _healed(
    cut: Adapter, model: str, steps: int, data: Sequence[str | Path], folder: Path, watcher: Watcher, options: Any
) -> Adapter:
    """The adapter after some steps of training, in the dtype that it had."""
    start = write_adapter(cut, folder / "cut")
    try:
        settings = make_settings(
            {"model": model, "adapter": start, "data": data, "steps": steps, "out": folder / "healing", **options}
        )
        run = create_run(settings)
        train_run(run, settings, watcher, "train")
    except Interrupted as stop:
        said = "Healing was stopped, and nothing was written. Begin it again"
        raise Interrupted(stop.exit_code, f"{said}; a run of --rank measure goes on by --resume.") from stop
    healed = read_adapter(run.adapter)
    for name, factors in healed.factors.items():
        like = cut.factors[name]
        healed.factors[name] = Factors(
            **{part: tensor.to(getattr(like, part).dtype) for part, tensor in factors.tensors()}
        )
    return healed
