"""What a caller does in one call: load, evaluate, merge, verify, bench. Joins base, data, engine and report.

Every function takes plain values and returns plain values or folders; it prints nothing. The command line is a thin
layer over these names.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from deltaw import hardware
from deltaw.adapter import Adapter, Injection, inject, read_adapter
from deltaw.adapter.files import WEIGHTS
from deltaw.analysis.spectrum import spectrum
from deltaw.analysis.weights import beside
from deltaw.base import load as base_load
from deltaw.base.builtin import BUILTIN
from deltaw.base.formed import stored_dtype
from deltaw.base.save import check_merged, write_merged
from deltaw.config import AS_TRAINED, AUTO, DEFAULT_MAX_LENGTH, Reading, Settings, parted
from deltaw.data.chat import Encoder
from deltaw.data.formats import Row, parse_sources, read_rows
from deltaw.data.prepare import DataSet, prepare
from deltaw.data.source import Fault
from deltaw.disk import disk_errors, require_new, write_text
from deltaw.engine import train as engine
from deltaw.engine.bench import bench as run_bench
from deltaw.engine.evaluate import evaluate as run_evaluation
from deltaw.engine.evaluate import held_out_loss
from deltaw.engine.forgetting import PROMPTS, STRENGTHS, neutral_texts, paragraphs
from deltaw.engine.forgetting import forgetting as measure_forgetting
from deltaw.engine.generate import generate, render_prompt
from deltaw.engine.prepare import Sketch, origin_warnings
from deltaw.engine.run import Run, adapter_folder, open_run, run_of
from deltaw.engine.train import Trainer
from deltaw.engine.verify import verify as run_verification
from deltaw.engine.watcher import Watcher
from deltaw.errors import AdapterError, DataError, DeltawError, Interrupted, UsageError, does_not_fit
from deltaw.planning import carry_out, plan_sketch

EVALUATION_TOKENS = 2048
Progress = Callable[[int, int], None]


class Model:
    """A base with at most one adapter: generate, evaluate, and turn the adapter's strength like a dial.

    `known` are the settings that the adapter was trained with: which tokens count, how long documents may be, the day
    that templates print, and what was put up with in the data. `evaluate` goes by them.
    """

    def __init__(
        self, base: base_load.Base, injection: Injection | None, known: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self.base, self.injection, self.known = base, injection, known

    def encoder(self, reading: Reading = AS_TRAINED) -> Encoder:
        """What makes tokens of rows as the adapter's training did, but for what `reading` says."""
        longest = reading.max_length or self.known.get("max_length", min(self.base.context_tokens, DEFAULT_MAX_LENGTH))
        train_on = reading.train_on or self.known.get("train_on", "assistant")
        day = reading.date or self.known.get("date", AUTO)
        today = None if day == AUTO else datetime.date.fromisoformat(day)
        allowed = {*self.known.get("allow", ()), *reading.allow}
        return Encoder(self.base.tokenizer, int(longest), train_on, allowed, today)

    @property
    def strength(self) -> float:
        """How much of the adapter acts: 1 all of it (as trained), 0 the plain base, which is all there is without one.

        In between, and beyond, ΔW counts that many times; with DoRA, so does the change that it makes to the output.
        """
        return 0.0 if self.injection is None or self.injection.active is None else self.injection.strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not math.isfinite(value):
            raise UsageError(f"A strength must be a finite number, not {value}.")
        if self.injection is not None:
            self.injection.active = 0 if value else None
            self.injection.strength = value
        elif value:
            raise UsageError("There is no adapter whose strength could be set.")

    def generate(self, prompt: str | Sequence[dict[str, Any]], **options: Any) -> str:
        """The answer to a prompt or a list of messages. Options: max_new_tokens, temperature, seed, on_text, on_cut."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return generate(self.base, messages, **options)

    def evaluate(self, data: Sequence[str | Path], progress: Progress | None = None, **reading: Any) -> dict[str, Any]:
        """Loss, perplexity, exact match and, where answers are labels, accuracy over data files, with intervals.

        `reading`: columns, allow, allow_lost, max_length, train_on and date, as for `train`; the last three are by
        default those of the adapter's training.
        """
        with self._encoded(data, reading) as prepared:
            return evaluate_set(self.base, prepared, progress)

    def forgetting(
        self,
        text: str | Path | None = None,
        strengths: Sequence[float] = STRENGTHS,
        data: Sequence[str | Path] = (),
        prompts: str | Path | None = None,
        **reading: Any,
    ) -> list[dict[str, Any]]:
        """Loss on neutral text, and KL to the base there and on unrelated prompts, at several strengths of the adapter.

        `text` and `prompts` are files of paragraphs in place of deltaw's own (deltaw/engine/forgetting.py). With
        `data`, the loss on it at each strength too (`data_loss`); `reading` as for `evaluate`.
        """
        if self.injection is None:
            raise UsageError("There is no adapter, so nothing is forgotten.")
        asked = paragraphs(prompts or PROMPTS)
        rows = measure_forgetting(self.base, self.injection, neutral_texts(text), asked, strengths)
        if data:
            usual = self.strength
            try:
                with self._encoded(data, reading) as prepared:
                    for row in rows:
                        self.strength = row["strength"]
                        row["data_loss"], _, _ = held_out_loss(self.base, prepared.store, EVALUATION_TOKENS, None)
            finally:
                self.strength = usual
        return rows

    @contextlib.contextmanager
    def _encoded(self, data: Sequence[str | Path], reading: Mapping[str, Any]) -> Iterator[DataSet]:
        """Data files as this adapter reads them, for as long as that is needed."""
        read, rest = parted(reading)
        if rest:
            raise UsageError(f"Nothing of how data is read: {', '.join(rest)}; there is {', '.join(Reading._fields)}.")
        with tempfile.TemporaryDirectory() as folder:
            sources = parse_sources(data, read.columns)
            yield prepare(sources, self.encoder(read), Path(folder), refuse_above=read.allow_lost, keep_rows=True)


def evaluate_set(
    base: base_load.Base, data: DataSet, progress: Progress | None = None, most_tokens: int = EVALUATION_TOKENS
) -> dict[str, Any]:
    """The numbers of one prepared data set; how many rows were cut or lost; the labels' names where there are any.

    Passes hold `most_tokens` at most: those of a run that is fitted into its memory hold no more than its own.
    """
    result = run_evaluation(base, data, min(most_tokens, EVALUATION_TOKENS), progress).as_dict()
    labels, counts = data.labels(), {"rows_cut": data.report.cut, "rows_lost": data.report.lost}
    return {**result, **counts, **({} if labels is None else {"labels": labels.names})}


def load(name: str | Path | None = None, adapter: str | Path | None = None, **options: Any) -> Model:
    """Opens a base, and an adapter or run folder over it. Options: device, dtype, revision, threads, quant, stream.

    Without `name`, the base that the adapter was trained on. `stream` "auto" (default) reads the base's blocks from its
    files where the memory does not suffice for all of it. Warns of a base that is not the one the adapter saw.
    """
    if adapter is not None:
        return open_adapter(adapter, name, lambda line: warnings.warn(line, stacklevel=4), **options)
    if name is None:
        raise UsageError("Name a base, an adapter, or both.")
    return Model(base_load.load(name, **{"stream": AUTO, **options}), None)


def open_adapter(
    path: str | Path, model: str | Path | None = None, say: Callable[[str], None] = lambda _: None, **options: Any
) -> Model:
    """An adapter or run over the base it was trained on, found by its origin unless `model` names one.

    `say` hears about a base or template that is not the one the adapter saw.
    """
    adapter = read_adapter(adapter_folder(path))
    if model is None and options.get("revision") is None and "revision" in adapter.origin:
        options = {**options, "revision": adapter.origin["revision"]}
    base = base_load.load(model or base_of(Path(path), adapter), tell=say, **{"stream": AUTO, **options})
    for line in origin_warnings(adapter, base):
        say(line)
    return Model(base, inject(base.model, adapter, dtype=base.dtype), adapter.settings)


def base_of(path: Path, adapter: Adapter) -> str:
    """Where the base lies: what the run was given, else the name in the adapter, if it says where to look."""
    run = run_of(path)
    if run is not None:
        return run.settings().model
    name = adapter.origin.get("base", "")
    if not name or (name not in BUILTIN and name.count("/") != 1 and not Path(name).exists()):
        raise AdapterError(f"{path} does not say where its base {name!r} lies; give --model FOLDER.")
    return name


# -- training ----------------------------------------------------------------------------------------------------------


def train_run(
    run: Run,
    settings: Settings,
    watcher: Watcher,
    verb: str,
    *,
    resume: bool = False,
    before: Callable[[Trainer], None] | None = None,
    after: Callable[[Trainer], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Runs the engine and, whatever happens, leaves a summary and a report."""
    with disk_errors("open", run.folder), run.locked():  # not while another process trains it
        run.write_summary({"status": "running", "verb": verb})  # what to go on as, should the process be killed
    try:
        # A run that was stopped before its plan was kept is planned when it goes on.
        fit = None if resume and run.plan.is_file() else partial(_fit, run, settings, watcher)
        trainer = engine.train(run, settings, watcher, resume=resume, plan=fit, before=before)
        status = "stopped early" if trainer.stopped_early else "done"
        summary = {"status": status, "verb": verb, **_summary(trainer), **(after(trainer) if after else {})}
    except BaseException as error:
        known = does_not_fit(error) or error
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        # What went wrong first is what the user must hear, so nothing that fails here may take its place.
        with contextlib.suppress(Exception):
            if isinstance(known, DeltawError) and not resume and not run.has_steps():
                shutil.rmtree(run.folder)  # nothing is lost, and the corrected command may use the name
            else:
                run.write_summary({"status": status, "verb": verb, "message": str(known)})
                _write_report(run)
        if known is not error:
            raise known from error
        raise
    run.write_summary(summary)
    _write_report(run)
    return summary


def _fit(run: Run, settings: Settings, watcher: Watcher, sketch: Sketch) -> None:
    """Has the plan's choices carried out, and keeps the plan in the run folder."""
    plan = plan_sketch(sketch, settings)
    carry_out(plan, settings)
    run.write_settings(settings)  # first, so that whoever finds a plan finds what it chose
    write_text(run.plan, json.dumps(plan.as_dict(), indent=2) + "\n")
    watcher.planned(plan.as_dict())


def _summary(trainer: Trainer) -> dict[str, Any]:
    track, ready = trainer.progress.tracks[0], trainer.ready
    base, machine = ready.base, hardware.look()
    shown = ("name", "kind", "shape", "rank", "alpha", "parameters")
    return {
        "steps": trainer.progress.step,
        "best_step": trainer.best_step,
        "best_eval_loss": trainer.best_loss if trainer.best_step else None,
        "base_eval_loss": trainer.base_loss,
        "train_seconds": trainer.progress.seconds,
        "peak_bytes": engine.peak_of(trainer.run),
        "opened_bytes": trainer.opened_bytes,  # the peak until the base was open
        "tokens": track.tokens,
        "trained_tokens": track.trained_tokens,
        "plan": trainer.run.read_plan() or None,
        "gemm_gflops": hardware.measure_gemm(base.dtype, seconds=0.1, device=str(base.device)),
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "machine": {"cpu_name": machine.cpu_name, "cores": machine.cores, "total_bytes": machine.total_bytes},
        "way": base.way,
        "computing": base.computing,
        "slow_reason": base.plain_reason or base.slow_reason,
        "sizes": {
            "adapter_bytes": (trainer.run.adapter / WEIGHTS).stat().st_size,
            "base_bytes": base.weight_bytes,
            "trained_parameters": ready.adapter.parameters,
            "base_parameters": base.parameters,
        },
        "targets": [{key: getattr(target, key) for key in shown} for target in ready.targets],
        "origin": read_adapter(trainer.run.adapter).origin,
        "data": {name: part.as_dict() for name, part in ready.data.items()},
        "findings": ready.data["train"].report.findings.as_list(),
    }


# -- after training ----------------------------------------------------------------------------------------------------


def evaluate(path: str | Path, data: Sequence[str | Path], model: str | None = None, **options: Any) -> dict[str, Any]:
    """`Model.evaluate` of an adapter or run folder over data files. Options: those of `load`, and its own."""
    read, machine = parted(options)
    return open_adapter(path, model, **machine).evaluate(data, **read._asdict())


# What rounding may change in a logit, as a share of the largest one, where all is fp32. In bf16 there is no such bound:
# a forward rounds more than what a missing layer changes (dev/LOG.md).
MERGE_TOLERANCE = 1e-3
MERGE_PROMPTS = ("The capital of France is", "def add(a, b):", "I loved this film because", "2 + 2 =")


def merge(
    path: str | Path,
    out: str | Path,
    model: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """Folds an adapter into its base, reads the folder back, checks every weight of it, and compares logits.

    Returns and stores (`merge.json` in the folder) how many weights carry the adapter, the largest difference of a
    logit from that of base and adapter, beside what the adapter itself changes, and whether each next token stayed the
    same. Raises AdapterError when a weight is not W + ΔW to half a unit in the last place, and, where files and
    forward are fp32, when logits differ by more than rounding explains.
    """
    require_new(Path(out))
    opened = open_adapter(path, model, say, **options)
    base, injection = opened.base, opened.injection
    assert injection is not None
    wanted = _logits(base)
    adapter, device, dtype, folder = injection.adapters[0], base.device.type, base.dtype, base.folder
    streamed = base.pager is not None
    injection.eject()
    plain = _logits(base)
    say("Writing the merged model.")
    write_merged(base, adapter, Path(out))
    del opened, base, injection  # two models at once may be too many,
    gc.collect()  # and hooks and modules refer to each other in circles
    say("Reading it back.")
    checked = check_merged(folder, adapter, Path(out))
    got = _logits(base_load.load(Path(out), device=device, dtype=str(dtype).removeprefix("torch."), stream=streamed))
    same = got.argmax(-1) == wanted.argmax(-1)
    record: dict[str, Any] = {
        "merged_weights": checked,
        "max_logit_difference": float((got - wanted).abs().max()),
        "max_logit_change_by_adapter": float((plain - wanted).abs().max()),
        "max_logit": float(wanted.abs().max()),
        "same_next_tokens": bool(same.all()),
        "positions": len(got),
        "positions_with_same_next_token": int(same.sum()),
        "computed_in": str(dtype).removeprefix("torch."),
        "dtype_of_files": str(stored_dtype(Path(out))).removeprefix("torch."),
        "origin": adapter.origin,
    }
    write_text(Path(out) / "merge.json", json.dumps(record, indent=2) + "\n")
    exact = dtype == torch.float32 and record["dtype_of_files"] == "float32"
    if exact and not record["max_logit_difference"] <= MERGE_TOLERANCE * record["max_logit"]:
        raise AdapterError(
            f"The merged model in {out} does not compute what base and adapter do: its logits differ by "
            f"{record['max_logit_difference']:.2e} of {record['max_logit']:.1f}. Do not use it."
        )
    return {**record, "folder": str(out)}


@torch.no_grad()
def _logits(base: base_load.Base) -> torch.Tensor:
    """Logits [T, V] at every position of the merge prompts."""
    prompts = [render_prompt(base, [{"role": "user", "content": prompt}]) for prompt in MERGE_PROMPTS]
    return torch.cat([base.document_logits(torch.tensor(ids, device=base.device)) for ids in prompts]).float()


def verify(path: str | Path, steps: int = 3, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Whether a run's files are what was saved, and whether it resumes bit for bit here: a list of checks."""

    class Saying(Watcher):
        def say(self, text: str) -> None:
            say(text)

    return run_verification(open_run(Path(path)), Saying(), steps)


def bench(
    model: str,
    rank: int = 16,
    seconds: float = 10,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    revision: str | None = None,
    quant: str = "none",
    stream: bool | str = AUTO,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """How fast a base trains here: for three kinds of documents tokens/s, share of the multiply rate, time by part."""
    base = base_load.load(
        model, device=device, dtype=dtype, threads=threads, revision=revision, quant=quant, stream=stream, tell=say
    )
    try:
        return run_bench(base, rank, seconds, say)
    except AdapterError as error:  # what was asked for does not suit the base
        raise UsageError(str(error)) from error


def beside_base(
    path: str | Path,
    model: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Per layer ΔW beside W: relative norm, amplification with its controls, intruders (deltaw/analysis/weights.py).

    Opens the base. Stacked experts are left out.
    """
    opened = open_adapter(path, model, say, **options)
    assert opened.injection is not None
    adapter, targets = opened.injection.adapters[0], opened.injection.targets
    opened.injection.eject()
    rows, stored = [], stored_dtype(opened.base.folder)
    for number, target in enumerate(targets):
        if progress is not None:
            progress(number, len(targets))
        if not adapter.is_stack(target.name):
            found = beside(spectrum(adapter, target.name), target.weight_matrix(), stored)
            rows.append({"name": target.name, **vars(found)})
    return rows


def keep_forgetting(path: str | Path, rows: Sequence[dict[str, Any]]) -> Path | None:
    """Keeps what `Model.forgetting` measured in the run folder, and draws it in its report; None of other adapters."""
    run = run_of(Path(path))
    if run is None or adapter_folder(path).resolve() != run.adapter.resolve():
        return None
    write_text(run.forgetting, json.dumps(list(rows), indent=2) + "\n")
    return _write_report(run)


def _write_report(run: Run) -> Path:
    from deltaw.report import write_report  # its plots hold 25 MB that training can use

    return write_report(run.folder)


def answers(
    model: Model,
    prompt: str | None,
    data: Sequence[str | Path],
    *,
    system: str | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """An answer to the prompt, and to every row of the data files; `cut_at` tells after how many tokens it was cut.

    Of a chat, the last answer, where it has one, is left out and becomes the `reference`; a text is asked as it stands.
    `system` stands before the prompt, and before rows that have no system message. A row that cannot be used or
    answered gets an `error` instead. Options: `columns` as for `train`, and those of `Model.generate`.
    """
    read, options = parted(options)
    before = [] if system is None else [{"role": "system", "content": system}]
    if prompt is not None:
        yield {"prompt": prompt, **_said(model, [*before, {"role": "user", "content": prompt}], options)}
    for row in read_rows(parse_sources(data, read.columns), to_answer=True):
        where = {"file": row.file, "row": row.number}
        found = {"error": row.reason} if isinstance(row, Fault) else _answer(model, row, before, options)
        yield {**where, **found}


def _answer(model: Model, row: Row, before: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    if row.tokens:
        return {"error": "it holds tokens; an answer needs a text or messages"}
    messages = list(row.messages) or [{"role": "user", "content": row.text}]
    known = messages.pop().get("content") if messages[-1]["role"] == "assistant" else None
    if not messages or messages[0]["role"] != "system":
        messages = [*before, *messages]
    try:
        said = _said(model, messages, {"tools": row.tools, **options})
    except DataError as error:
        return {"error": str(error)}
    return {**said, **({} if known is None else {"reference": known})}


def _said(model: Model, messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    cut: list[int] = []
    answer = model.generate(messages, on_cut=cut.append, **options)
    return {"answer": answer, **({"cut_at": cut[0]} if cut else {})}
