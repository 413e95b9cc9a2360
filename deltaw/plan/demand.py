"""What a run asks of a machine, and the choices that a plan may make for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from deltaw.adapter.layer import Target
from deltaw.base.formed import (
    Mapped,
    asks_its_layers,
    has_one_dtype,
    is_widened,
    mapped_numbers,
    may_form_embedding,
    stored_dtype,
)
from deltaw.base.load import MAX_CONTEXT
from deltaw.base.quant import BYTES
from deltaw.base.shapes import Outline
from deltaw.base.stream import MAPPED_SHARE, may_stream
from deltaw.config import AUTO, EVALUATIONS_PER_RUN, Settings, steps_between
from deltaw.data.loader import Loader, evaluation_batches, heaviest_pass, loader_of
from deltaw.data.pack import Batch, scored_batch
from deltaw.data.prepare import DataSet

SAMPLED_STEPS = 16


class Choice(NamedTuple):
    """How a run is fitted into memory; none of it but `quant` changes a result beyond rounding."""

    micro_tokens: int
    recompute: int = 0
    stream: bool = False
    quant: str = "none"


class Pass(NamedTuple):
    """One forward pass: the lengths of its documents as they are computed, and how many tokens carry loss."""

    lengths: tuple[int, ...]
    labelled: int

    @classmethod
    def of(cls, batch: Batch) -> Pass:
        """The pass that computes this batch."""
        return cls(tuple(np.diff(batch.bounds).tolist()), batch.trained_tokens)

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Demand:
    """A run before its base is opened: shapes, settings with every rule resolved, adapted layers, encoded data."""

    outline: Outline
    settings: Settings
    targets: Sequence[Target]
    data: Mapping[str, DataSet]
    longest_tokens: int = MAX_CONTEXT  # what if documents were cut here,
    rank_share: float = 1.0  # and the adapter so many times as large
    active_share: float | None = None  # of the largest, where several adapters take turns over one base
    streams: bool | None = None  # whether its machine reads blocks from mapped files; None: as the one that is here
    _steps: dict[tuple[int, bool], list[list[Pass]]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.settings.device)

    @property
    def dtype(self) -> torch.dtype:
        """In what it computes."""
        dtype: torch.dtype = getattr(torch, self.settings.dtype)
        return dtype

    @cached_property
    def trained(self) -> int:
        """How many numbers are trained."""
        return round(self.rank_share * sum(target.parameters for target in self.targets))

    @cached_property
    def ranks(self) -> int:
        """The sum of the ranks of all adapted layers, of the adapter that is active."""
        share = self.rank_share if self.active_share is None else self.active_share
        return round(share * sum(target.rank for target in self.targets))

    def loader(self, micro_tokens: int, *, share: bool) -> Loader:
        """The order in which the run takes its documents."""
        return loader_of(self.data["train"], self.settings, share=share, micro_tokens=micro_tokens)

    def steps(self, micro_tokens: int, *, share: bool) -> list[list[Pass]]:
        """The passes of the run's first steps."""
        if (micro_tokens, share) not in self._steps:
            loader = self.loader(micro_tokens, share=share)
            self._steps[micro_tokens, share] = [
                [Pass.of(batch) for batch in batches]
                for batches in loader.first_steps(SAMPLED_STEPS, loader.stop_after(self.settings.whole_epochs))
            ]
        return self._steps[micro_tokens, share]

    @cached_property
    def _heaviest(self) -> dict[int, Pass]:
        return {}

    def heaviest(self, micro_tokens: int) -> Pass:
        """The longest document, and as many of the next longest as one pass may hold beside it."""
        if micro_tokens not in self._heaviest:
            self._heaviest[micro_tokens] = self._find_heaviest(micro_tokens)
        return self._heaviest[micro_tokens]

    def _find_heaviest(self, micro_tokens: int) -> Pass:
        store = self.data["train"].store
        lengths = np.minimum(store.lengths, self.longest_tokens)
        documents = heaviest_pass(self.data["train"], self.settings, micro_tokens, lengths)
        labelled = np.minimum(store.trained[documents], lengths[documents]).sum()
        return Pass(tuple(int(n) for n in lengths[documents]), int(labelled))

    def tokens_a_reading(self, choice: Choice, way: str) -> int:
        """How many tokens one reading of the base serves, as Base.tokens_a_reading; 0 where passes run one by one."""
        outline, b = self.outline, self.dtype.itemsize
        if not choice.stream or way != "kernels" or choice.recompute < outline.layers:
            return 0
        return self.block_bytes(choice) // ((outline.layers + 1) * outline.hidden * b)

    def block_bytes(self, choice: Choice) -> int:
        """What the weights of one block take as they are held."""
        outline, b = self.outline, self.dtype.itemsize
        linear = outline.linear_parameters / max(1, outline.layers)
        return round(outline.block_parameters * b + linear * (self._held_bytes(choice) - b))

    def _held_bytes(self, choice: Choice) -> float:
        """Bytes of one weight of a linear layer."""
        if choice.quant != "none":
            return BYTES[choice.quant]
        return self.stored_dtype.itemsize if choice.stream or self.keeps_stored else self.dtype.itemsize

    def forms(self, choice: Choice) -> bool:
        """Whether linear layers form their weights each time they are read."""
        return choice.quant != "none" or (not self.as_stored and (choice.stream or self.keeps_stored))

    @cached_property
    def keeps_stored(self) -> bool:
        """Whether a base that is neither quantised nor streamed keeps its weights as its files have them."""
        formed = is_widened(self.outline.folder, self.device, self.dtype) and asks_its_layers(self.outline.model)
        return self.as_stored or formed

    @cached_property
    def forms_embedding(self) -> bool:
        """Whether the rows of an embedding are cast when they are looked up, where layers form their weights."""
        return self.device.type == "cpu" and not self.as_stored and may_form_embedding(self.outline.model)

    @cached_property
    def step_count(self) -> int | None:
        """How many optimiser steps the run has; None where minutes bound it."""
        settings = self.settings
        if settings.minutes is not None:
            return None
        if settings.steps is not None:
            return settings.steps
        loader = self.loader(int(settings.batch_tokens), share=False)
        stop = loader.stop_after(settings.whole_epochs)
        assert stop is not None
        return loader.steps_until(stop)

    @cached_property
    def evaluations(self) -> int:
        """How many evaluations the run has."""
        every, steps = self.settings.eval_steps, self.step_count
        if steps is None:
            return EVALUATIONS_PER_RUN
        return -(-steps // (steps_between(steps) if every == AUTO else int(every)))

    def may_stream(self, quant: str) -> bool:
        """Whether blocks can be read from mapped files as they are needed: hardly anything of them is cast before."""
        if not (may_stream(self.device) if self.streams is None else self.streams):
            return False
        choice = Choice(0, stream=True, quant=quant)
        if quant == "none" and not self.as_stored and not self._one_dtype:
            return False
        found, held, b = self._mapped_numbers, self._held_bytes(choice), self.dtype.itemsize
        linear = found.linear if quant == "none" else found.all_linear  # what is quantised lies in the cache
        mapped = linear * held + (found.others * b if self.as_stored else 0)
        return mapped >= MAPPED_SHARE * (found.all_linear * held + found.all_others * b)

    @property
    def as_stored(self) -> bool:
        """Whether weights are computed in the dtype in which they are stored, so that they need no copy."""
        return self.stored_dtype == self.dtype

    @cached_property
    def _mapped_numbers(self) -> Mapped:
        return mapped_numbers(self.outline.model, self.outline.folder)

    @cached_property
    def _one_dtype(self) -> bool:
        return has_one_dtype(self.outline.folder)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """In what the base's files have their weights."""
        return stored_dtype(self.outline.folder)

    def evaluation(self, micro_tokens: int, *, share: bool) -> list[Pass]:
        """The passes of one evaluation, none without held-out data."""
        if "eval" not in self.data:
            return []
        store = self.data["eval"].store
        cut = evaluation_batches(store, micro_tokens, self.settings.eval_rows, share=share)
        return [Pass.of(scored_batch(store, documents, share=share)) for documents in cut]
