"""The heaviest moments of a run, taken once before it: what does not fit shows in the first seconds, not in hour three.

The longest batch goes forward and backward, with an optimiser step, the longest evaluation batch if that may be heavier
than what went forward already, and a checkpoint. Then everything is put back exactly. A probe that passed is remembered
under the digest of all that decides it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from deltaw import hardware
from deltaw.base.builtin import cache_folder
from deltaw.base.load import most_together
from deltaw.data.loader import evaluation_batches, heaviest_pass
from deltaw.data.pack import batch_of
from deltaw.disk import disk_errors, keep_note
from deltaw.engine.checkpoint import save_checkpoint
from deltaw.engine.objective import accumulate, head_factors, score_batch
from deltaw.errors import DoesNotFitError, does_not_fit

if TYPE_CHECKING:
    from deltaw.engine.train import Trainer


def probe(trainer: Trainer) -> None:
    """Passes where the run's heaviest step, evaluation and save fit into memory.

    Raises DoesNotFitError with the row that does not fit, and leaves the trainer as it was in either case.
    """
    with disk_errors("read", Path("/proc")):
        memory = cache_folder() / "probes" / _key(trainer)
    if memory.is_file():
        return
    train, settings = trainer.ready.data["train"], trainer.settings
    documents = heaviest_pass(train, settings)
    random_state = torch.get_rng_state()
    master = trainer.flat.master.clone()
    try:
        _step(trainer, documents)
        _evaluate(trainer, train.store.lengths[documents])
        _save(trainer)
    except (RuntimeError, MemoryError) as error:
        raise _too_much(error, trainer, documents) from error
    finally:
        trainer.flat.reset(master)
        torch.set_rng_state(random_state)
        hardware.give_memory_back()
    keep_note(memory, "")


def _key(trainer: Trainer) -> str:
    machine = hardware.look()
    settings = trainer.settings.without_places()
    gpu = None if machine.gpu is None else asdict(machine.gpu)
    parts = [trainer.state()["digests"], settings, machine.memory_limit_bytes, gpu, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _step(trainer: Trainer, documents: list[int]) -> None:
    base, store = trainer.ready.base, trainer.ready.data["train"].store
    trainer.injection.train(True)
    batch = batch_of(store, documents)
    together = min(base.tokens_a_reading, int(trainer.settings.batch_tokens)) // batch.computed_tokens
    accumulate(base, [batch] * min(most_together(), max(1, together)), 1.0, head_factors(base, trainer.injection))
    trainer.flat.step([0.0])
    trainer.injection.train(False)


def _evaluate(trainer: Trainer, passed: np.ndarray) -> None:
    """The heaviest evaluation batch, unless documents no shorter have passed, with gradients, in a batch as full.

    As full: there was no room for one more. The run's own steps are let off as much.
    """
    held_out = trainer.ready.held_out
    if held_out is None:
        return
    batches = evaluation_batches(held_out.store, int(trainer.settings.micro_tokens), trainer.settings.eval_rows)
    longest = max(batches, key=lambda documents: int(held_out.store.lengths[documents].sum()))
    lengths = held_out.store.lengths[longest]
    if lengths.sum() <= passed.sum() + passed.max() and lengths.max() <= passed.max():
        return
    score_batch(trainer.ready.base, batch_of(held_out.store, longest).to(trainer.ready.base.device))


def _save(trainer: Trainer) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in trainer.flat.state().items()}
    with tempfile.TemporaryDirectory(dir=trainer.run.folder, prefix=".probe-") as folder:
        save_checkpoint(Path(folder), 0, tensors, trainer.state(), 1)


def _too_much(error: Exception, trainer: Trainer, documents: list[int]) -> Exception:
    known = does_not_fit(error)
    if known is None:
        return error
    store = trainer.ready.data["train"].store
    file, row = store.place(documents[0])
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    tokens, longest = int(store.lengths[documents].sum()), int(store.lengths[documents[0]])
    return DoesNotFitError(
        f"The heaviest step does not fit into memory: {tokens:,} tokens, the longest document among them {file}, "
        f"row {row} with {longest:,}. Give --max-length below {longest:,}, smaller --micro-tokens (now "
        f"{trainer.settings.micro_tokens}), or take that row out. ({first_line})"
    )
