"""What a caller does with data alone: check a set, show rows as the model sees them. No model is opened.

Nothing heavy is imported before a tokenizer is needed, so that a set whose tokens lie in the cache is checked at once.
"""

from __future__ import annotations

import datetime
import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltaw.base.builtin import token_cache
from deltaw.base.locate import locate, open_tokenizer, stated_context, template_prints_the_day, tokenizer_digest
from deltaw.config import AUTO, DEFAULT_MAX_LENGTH, Settings
from deltaw.data.check import check
from deltaw.data.encoding import LazyEncoder, encoding_digest
from deltaw.data.findings import refuse_unknown
from deltaw.data.formats import parse_sources, read_rows
from deltaw.data.prepare import prepare
from deltaw.data.source import Fault


def lazy_encoder(settings: Settings) -> LazyEncoder:
    """The encoder that a run with these settings would use, its tokenizer not yet opened."""
    refuse_unknown(settings.allow)
    folder = locate(settings.model, settings.revision)
    length = stated_context(folder) or DEFAULT_MAX_LENGTH
    max_length = min(length, DEFAULT_MAX_LENGTH) if settings.max_length == AUTO else int(settings.max_length)
    today = datetime.date.today() if settings.date == AUTO else datetime.date.fromisoformat(settings.date)
    known = tokenizer_digest(folder)
    day = today if template_prints_the_day(folder) else None

    def opened() -> Any:
        encoder = importlib.import_module("deltaw.data.chat").Encoder
        return encoder(open_tokenizer(folder), max_length, settings.train_on, settings.allow, today, known)

    digest = encoding_digest(known, max_length, settings.train_on, settings.allow, day)
    return LazyEncoder(opened, digest, frozenset(settings.allow))


def check_data(settings: Settings, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """The page on `settings.data` (and `settings.eval_data`, with what stands in both): see deltaw/data/check.py.

    Raises DataError only for files that cannot be opened at all; everything else is a finding.
    """
    encoder = lazy_encoder(settings)
    with tempfile.TemporaryDirectory() as otherwise:
        cache = token_cache(Path(otherwise))
        parts = [
            prepare(parse_sources(texts, settings.columns), encoder, cache, refuse_above=None, progress=progress)
            for texts in (settings.data, settings.eval_data)
            if texts
        ]
        return check(*parts)


def show_data(settings: Settings, first: int = 1) -> Iterator[dict[str, Any]]:
    """Every row from number `first` on as the model sees it: file, row, format, stretches; or the error that it has."""
    stretches = importlib.import_module("deltaw.data.show").stretches
    encoder = lazy_encoder(settings).ready()
    rows = (row for row in read_rows(parse_sources(settings.data, settings.columns)) if row.number >= first)
    for row, found in zip_rows(encoder, rows):
        place = {"file": row.file, "row": row.number}
        if isinstance(found, Fault):
            yield {**place, "error": found.reason, "code": found.code}
        elif found.row.skip is not None:
            yield {**place, "format": found.row.format, "skipped": found.row.skip}
        else:
            shown = [list(stretches(example, encoder.tokenizer, encoder.special)) for example in found.examples]
            notes = [{"code": code, "what": what} for code, what in found.notes]
            yield {**place, "format": found.row.format, "documents": shown, "notes": notes}


def zip_rows(encoder: Any, rows: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Each row with what became of it, one at a time: what is looked at need not wait for more."""
    for row in rows:
        (found,) = encoder.encode_many([row])
        yield row, found
