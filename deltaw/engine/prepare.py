"""From settings to what a run needs before its first step, in two halves: a sketch without any weight, then the base.

The sketch knows shapes, token lengths and every setting that a rule decides; what a run will cost follows from it.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from deltaw import hardware
from deltaw.adapter import Adapter, LoraSpec, choose, choose_for, new_adapter, read_adapter
from deltaw.adapter.layer import Target
from deltaw.base.builtin import token_cache
from deltaw.base.load import LAYER_PRODUCTS, Base, load, place
from deltaw.base.locate import tokenizer_digest
from deltaw.base.proof import prepare_passes
from deltaw.base.shapes import Outline, outline
from deltaw.config import (
    AUTO,
    DEFAULT_MAX_LENGTH,
    Settings,
    default_batch_tokens,
    default_rank,
    default_rate,
    parse_bytes,
    parse_layers,
    parse_pattern,
)
from deltaw.data.agreement import examples_of, template_warning
from deltaw.data.chat import Encoder
from deltaw.data.check import check, summary_lines
from deltaw.data.formats import parse_sources
from deltaw.data.loader import heaviest_pass, loader_of
from deltaw.data.prepare import DataSet, held_out_share, prepare
from deltaw.engine.run import Run
from deltaw.engine.watcher import Watcher
from deltaw.errors import AdapterError, UsageError
from deltaw.kernels import Span, continued_spans, spans_of
from deltaw.kernels.tiles import attends_whole, products

# Of a pass: more take memory and save nothing on a processor; with fewer, a GPU waits for its next call.
DEFAULT_MICRO_TOKENS = {"cpu": 1024, "mps": 1024, "cuda": 8192}
# A base that takes more than this of the memory may come to be streamed, although no plan is made yet.
LARGE_SHARE, SHARED_BYTES = 0.5, 1_000_000_000
# Products that oneDNN remembers, 1 to 3 MB each: SHARING where passes may share a reading, and some SPARE, as the next
# pass has many of the last one's.
LEAST_PRODUCTS, SHARING_PRODUCTS, MOST_PRODUCTS, SPARE_PRODUCTS = 64, 128, 1024, 24
SAMPLED_STEPS = 8  # whose passes are looked at


@dataclass
class Sketch:
    """A run before its base is opened. `targets` are layers of a model without weights."""

    outline: Outline
    data: dict[str, DataSet]
    data_lines: list[str]
    start: Adapter | None
    targets: list[Target]

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(target.parameters for target in self.targets)


@dataclass
class Prepared:
    """What a run needs before its first step."""

    base: Base
    data: dict[str, DataSet]
    data_lines: list[str]
    adapter: Adapter
    targets: list[Target]

    @property
    def held_out(self) -> DataSet | None:
        """What is measured during the run, if anything."""
        return self.data.get("eval")

    @cached_property
    def template_examples(self) -> str:
        """How the template renders what `agreement` asks of it, which every adapter of the run says."""
        return examples_of(self.base.tokenizer)


def sketch_run(
    run: Run, settings: Settings, watcher: Watcher, there: tuple[torch.device, torch.dtype] | None = None
) -> Sketch:
    """Shapes, data and targets of a run; resolves every `auto` in the settings by its rule. No weight is read.

    `there` is where and in what another machine would compute.
    """
    hardware.set_threads(settings.threads)
    known = outline(settings.model, settings.revision)
    if settings.max_length == AUTO:
        settings.put(
            "max_length",
            min(known.context_tokens, DEFAULT_MAX_LENGTH),
            f"rule: the model's context, at most {DEFAULT_MAX_LENGTH}",
        )
    data, lines = _prepare_data(run, settings, known, watcher)
    _require_positions(known, data)
    start = None if settings.adapter is None else read_adapter(run.start)
    targets = _choose_targets(settings, known, start)
    _resolve_rules(settings, known, data["train"], there or _here(settings, watcher))
    _remember_products(known, settings, data["train"], watcher)
    return Sketch(known, data, lines, start, targets)


def _require_positions(known: Outline, data: dict[str, DataSet]) -> None:
    """Raises UsageError where a document is longer than a base has positions, if these are learned, one by one."""
    longest = max(int(each.store.lengths.max()) for each in data.values())
    tokens = known.model.get_input_embeddings()
    tables = [part for part in known.model.modules() if isinstance(part, nn.Embedding) and part is not tokens]
    learned = any(0 <= table.num_embeddings - known.context_tokens <= 2 for table in tables)  # some keep two to spare
    if learned and longest > known.context_tokens:
        raise UsageError(
            f"A document has {longest:,} tokens, and {known.name} knows {known.context_tokens:,} positions. Give "
            f"--max-length {known.context_tokens}."
        )


def _remember_products(known: Outline, settings: Settings, train: DataSet, watcher: Watcher) -> None:
    """Has oneDNN keep as many prepared products as passes need: one too few, and each block prepares all of its own."""
    if not hardware.prepares_products(torch.device(settings.device), getattr(torch, settings.dtype)):
        hardware.tune_memory()
        return
    attention = _attention_products(known, settings, train)
    needed = -(-(LAYER_PRODUCTS + attention + SPARE_PRODUCTS) // 16) * 16
    least = SHARING_PRODUCTS if _may_stream(known, settings) else LEAST_PRODUCTS
    hardware.tune_memory(min(MOST_PRODUCTS, max(least, needed)))
    remembered = hardware.remembered_products()
    if remembered < min(needed, MOST_PRODUCTS):  # an earlier run of this process, or its environment, said so
        watcher.say(
            f"This process remembers {remembered} prepared products, and passes of these documents need {needed}: "
            "steps may take longer than in a process of their own."
        )


def _attention_products(known: Outline, settings: Settings, train: DataSet) -> int:
    """How many products of different shapes attention takes in one pass at most."""
    prepare_passes()
    cap = getattr(known.config, "attn_logit_softcapping", None)
    if attends_whole(torch.device(settings.device), getattr(torch, settings.dtype), known.head_width, cap):
        return 0
    windows = {None, getattr(known.config, "sliding_window", None)}
    return max(products(spans, windows) for spans in _passes(settings, train))


def _passes(settings: Settings, train: DataSet) -> Iterator[tuple[Span, ...]]:
    """The heaviest pass, and those of the first steps."""
    heavy = train.store.lengths[heaviest_pass(train, settings)]
    yield spans_of([0, *heavy.cumsum().tolist()])
    loader = loader_of(train, settings, share=settings.share_prefixes)
    for batches in loader.first_steps(SAMPLED_STEPS, loader.stop_after(settings.whole_epochs)):
        for batch in batches:
            yield continued_spans(batch.bounds, batch.before)


def _may_stream(known: Outline, settings: Settings) -> bool:
    """Whether the base is, or is likely to be, read from its files block by block: it takes much of the memory.

    Not of a small one, whose reading costs less than the memory that more products take.
    """
    if not settings.by_rule("stream"):
        return bool(settings.stream)
    machine = hardware.look()
    limit = min(machine.memory_limit_bytes, machine.available_bytes)
    if settings.memory is not None:
        limit = min(limit, parse_bytes(settings.memory))
    size = known.parameters * getattr(torch, settings.dtype).itemsize
    return size > max(LARGE_SHARE * limit, SHARED_BYTES)


def prepare_run(sketch: Sketch, settings: Settings, watcher: Watcher) -> Prepared:
    """Opens the base of a sketched run, as its settings say by now."""
    base = load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        revision=settings.revision,
        threads=settings.threads,
        tokenizer=sketch.outline.tokenizer,
        quant=settings.quant,
        stream=settings.stream if settings.stream == AUTO else bool(settings.stream),
        tell=watcher.say,
    )
    base.recompute(int(settings.recompute))
    if base.plain_reason is not None:
        watcher.say(f"One document at a time, in the model's own way: {base.plain_reason}.")
    if sketch.start is not None:
        for line in origin_warnings(sketch.start, base):
            watcher.say(line)
        adapter, targets = sketch.start, choose_for(base.model, sketch.start)
    else:
        spec = spec_from(settings, int(settings.rank))
        targets = choose(base.model, spec)
        adapter = new_adapter(targets, spec, settings.seed)
    return Prepared(base, sketch.data, sketch.data_lines, adapter, targets)


def make_encoder(base: Base | Outline, settings: Settings) -> Encoder:
    """The encoder that these settings ask for."""
    today = None if settings.date == AUTO else datetime.date.fromisoformat(settings.date)
    return Encoder(
        base.tokenizer,
        int(settings.max_length),
        settings.train_on,
        settings.allow,
        today,
        tokenizer_digest(base.folder),
    )


def _prepare_data(
    run: Run, settings: Settings, known: Outline, watcher: Watcher
) -> tuple[dict[str, DataSet], list[str]]:
    """The data sets "train" and, if anything is held out, "eval"; and what the check says of them in a few lines."""
    encoder, cache = make_encoder(known, settings), token_cache(run.tokens)

    def part(texts: Sequence[str]) -> DataSet:
        sources = parse_sources(texts, settings.columns)
        return prepare(sources, encoder, cache, refuse_above=settings.allow_lost, progress=watcher.reading)

    train = part(settings.data)
    if settings.eval_data:
        data = {"train": train, "eval": part(settings.eval_data)}
        checked = check(train, data["eval"])
    else:
        below = held_out_share(train.row_shares)
        checked = check(train)
        data = dict(zip(("train", "eval"), train.split(below), strict=True)) if below else {"train": train}
    return data, summary_lines(checked, settings.train_on, data)


def spec_from(settings: Settings, rank: int) -> LoraSpec:
    """The adapter's spec as the settings have it."""
    return LoraSpec(
        rank=rank,
        alpha=settings.alpha,
        targets=settings.targets,
        exclude=settings.exclude,
        layers=None if settings.layers is None else parse_layers(settings.layers),
        dropout=settings.dropout,
        rslora=settings.rslora,
        dora=settings.dora,
        rank_pattern=parse_pattern(settings.rank_pattern, int),
        alpha_pattern=parse_pattern(settings.alpha_pattern, float),
    )


def _choose_targets(settings: Settings, known: Outline, start: Adapter | None) -> list[Target]:
    """The layers that get factors, and the settings that follow from them or from the adapter to start from."""
    if start is not None:
        for name, value in start_settings(start).items():
            settings.put(name, value, "the adapter it starts from")
        return choose_for(known.model, start)
    try:
        if settings.rank == AUTO:
            plain = choose(known.model, spec_from(settings, 1).with_(dora=False))
            settings.put("rank", *default_rank(sum(target.parameters for target in plain), known.parameters))
        return choose(known.model, spec_from(settings, int(settings.rank)))
    except AdapterError as error:  # what was asked for does not suit the base
        raise UsageError(str(error)) from error


def start_settings(adapter: Adapter) -> dict[str, Any]:
    """The settings that an adapter to start from decides."""
    spec = adapter.spec
    return {
        "rank": spec.rank,
        "alpha": spec.alpha,
        "targets": adapter.modules,
        "rank_pattern": tuple(f"{key}={value}" for key, value in spec.rank_pattern.items()),
        "alpha_pattern": tuple(f"{key}={value:g}" for key, value in spec.alpha_pattern.items()),
        "dropout": spec.dropout,
        "rslora": spec.rslora,
        "dora": spec.dora,
    }


def origin_warnings(adapter: Adapter, base: Base) -> list[str]:
    """What to say of a base whose weights, storage, tokenizer or template the adapter was not trained with."""
    origin, said = adapter.origin, []
    if origin.get("base_digest", base.digest) != base.digest:
        said.append("WARNING: the weights of this base are not those of the adapter's training; expect worse answers.")
    if origin.get("template_digest", base.template_digest) != base.template_digest:
        said.append(template_warning(origin.get("template_examples"), base.tokenizer))
    if (trained := adapter.settings.get("quant", base.quant)) != base.quant:
        stored = {name: "as it is" if name == "none" else f"in {name}" for name in (trained, base.quant)}
        said.append(
            f"The adapter was trained over its base {stored[trained]}, and here the base is {stored[base.quant]}: what "
            f"is measured differs a little (--quant {trained} is what it saw)."
        )
    return said


def _here(settings: Settings, watcher: Watcher) -> tuple[torch.device, torch.dtype]:
    """Where and in what this machine computes; says so where that is slow."""
    device, dtype = place(settings.device, settings.dtype)
    if dtype == torch.bfloat16 and hardware.compute_dtype(device, hardware.look()) != torch.bfloat16:
        _say_slow(device, watcher)
    return device, dtype


def _say_slow(device: torch.device, watcher: Watcher) -> None:
    if device.type == "cpu" and not hardware.emulates_bf16(hardware.look()):
        watcher.say("This processor multiplies in bfloat16 half as fast as in float32; what it saves is memory.")
    else:
        watcher.say(f"bfloat16 is emulated on this {device.type}: float32 would be many times as fast.")


def _resolve_rules(settings: Settings, known: Outline, train: DataSet, place: tuple[torch.device, torch.dtype]) -> None:
    device, dtype = place
    if settings.lr == AUTO:
        settings.put("lr", *default_rate(known.hidden, str(known.config.model_type)))
    if settings.batch_tokens == AUTO:
        settings.put("batch_tokens", *default_batch_tokens(float(train.store.lengths.mean())))
    if settings.micro_tokens == AUTO:
        most = DEFAULT_MICRO_TOKENS[device.type]
        settings.put("micro_tokens", min(int(settings.batch_tokens), most), f"rule: the batch, at most {most}")
    if settings.steps is None and settings.minutes is None and settings.epochs is None:
        settings.put("epochs", 1.0, "default")
    for name, now in (("device", str(device)), ("dtype", str(dtype).removeprefix("torch."))):
        if getattr(settings, name) == AUTO:
            settings.put(name, now, "rule: the fastest that this machine has")
    for name, plain in (("recompute", 0), ("stream", False), ("quant", "none")):
        if getattr(settings, name) == AUTO:
            settings.put(name, plain, "rule: the fastest")
    if int(settings.recompute) > known.layers:
        settings.put("recompute", known.layers, "all blocks that there are")
    if settings.threads is None:
        settings.put("threads", torch.get_num_threads(), "rule: the cores that this process may use")
