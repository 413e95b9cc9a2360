"""The demo: the built-in base trained on the shipped reviews and tweets, measured before and after on held-out ones."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from deltaw.adapter import inject, read_adapter
from deltaw.api import evaluate_set, train_run
from deltaw.base.builtin import token_cache
from deltaw.config import Settings, make_settings
from deltaw.data.prepare import prepare
from deltaw.engine.generate import generate
from deltaw.engine.prepare import make_encoder
from deltaw.engine.run import Run, create_run
from deltaw.engine.train import Trainer
from deltaw.engine.watcher import Watcher

DEMO_SETTINGS: dict[str, Any] = {"rank": 16, "batch_tokens": 1024, "steps": 120, "eval_rows": 150}
DEMO_SAMPLES = 6


def snippets(split: str) -> Path:
    """The shipped demo data: "train", "validation" or "test"."""
    return Path(str(resources.files("deltaw") / "data" / "snippets" / f"{split}.jsonl.gz"))


def demo(
    watcher: Watcher | None = None, run: Run | None = None, settings: Settings | None = None, **given: Any
) -> dict[str, Any]:
    """Trains the built-in base on the shipped reviews and tweets and measures it before and after on the test split.

    Returns the run's summary with `results` (base, VADER rules, adapter), `samples` and `run` (its folder).
    """
    watcher = watcher or Watcher()
    settings = settings or demo_settings(given)
    run = run or create_run(settings)
    return {**train_demo(run, settings, watcher), "run": str(run.folder)}


def train_demo(run: Run, settings: Settings, watcher: Watcher, *, resume: bool = False) -> dict[str, Any]:
    """The demo in a run folder that stands already, from its beginning or from where it was stopped."""
    before: dict[str, Any] = {}
    return train_run(
        run, settings, watcher, "demo", resume=resume,
        before=lambda trainer: before.update(_measure_demo(trainer, watcher, adapted=False)),
        after=lambda trainer: _compare_demo(before, _measure_demo(trainer, watcher, adapted=True)),
    )  # fmt: skip


def demo_settings(given: dict[str, Any]) -> Settings:
    """The demo's settings, with what the caller gave on top."""
    data = {"data": [str(snippets("train"))], "eval_data": [str(snippets("validation"))]}
    return make_settings(given, {**DEMO_SETTINGS, **data})


def _measure_demo(trainer: Trainer, watcher: Watcher, *, adapted: bool) -> dict[str, Any]:
    base, injection = trainer.ready.base, trainer.injection
    injection.eject()
    watcher.say(f"Measuring the {'adapter' if adapted else 'base'} on the test split.")
    encoder = make_encoder(base, trainer.settings)
    test = prepare([snippets("test")], encoder, token_cache(trainer.run.tokens), keep_rows=True)
    using = inject(base.model, read_adapter(trainer.run.adapter), dtype=base.dtype) if adapted else None
    result = evaluate_set(base, test, getattr(watcher, "measured", None), int(trainer.settings.micro_tokens))
    rows = test.prompts[:: len(test.prompts) // DEMO_SAMPLES][:DEMO_SAMPLES]
    answers = [generate(base, row.messages[:-1], max_new_tokens=24) for row in rows]
    if using is not None:
        using.eject()
    injection.reapply()
    return {"result": result, "rows": rows, "answers": answers}


def _compare_demo(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    vader = json.loads((snippets("test").parent / "vader.json").read_text("utf-8"))
    rules = vader["settings"][vader["best"]]
    low, high = rules["accuracy_95"]
    samples = [
        {"prompt": row.messages[-2]["content"], "reference": row.answer, "before": old, "after": new}
        for row, old, new in zip(before["rows"], before["answers"], after["answers"], strict=True)
    ]
    results = [
        {"label": "base model", **before["result"]},
        {"label": "VADER rules", "accuracy": rules["accuracy"], "low": low, "high": high, "rows": vader["num_rows"]},
        {"label": "adapter", **after["result"]},
    ]
    return {"results": results, "samples": samples}
