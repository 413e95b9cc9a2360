"""What became of every row of a data set: used, cut, or left out with its reason. Nothing is lost unnamed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deltaw.data.chat import Encoder, Example, encode_rows
from deltaw.data.pack import TokenStore
from deltaw.data.source import Fault, Row, read_rows
from deltaw.errors import DataError, bullet_list

MAX_LABELS = 20
_FAULTS_KEPT = 1000


@dataclass
class DataSummary:
    """Counts of one split, and the first faults. `rows`, `used`, `cut` and `lost` count rows, not pieces of them."""

    rows: int = 0
    used: int = 0
    cut: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    lost: int = 0
    faults: list[Fault] = field(default_factory=list)
    digest: str = ""

    def as_dict(self) -> dict[str, object]:
        """For JSON: everything, faults as text."""
        return {**vars(self), "faults": [str(fault) for fault in self.faults[:20]]}


@dataclass
class Labels:
    """The answers of a data set that is a choice among few: `names`, and each document's own as an index."""

    names: list[str]
    of_document: list[int]


@dataclass
class DataSet:
    """One split, ready for training or evaluation. `answers` are the reference answers, kept for evaluation only."""

    store: TokenStore
    summary: DataSummary
    prompts: list[Row] = field(default_factory=list)

    def labels(self) -> Labels | None:
        """The answers as labels, when there are 2 to 20 different ones and on average 3 rows or more for each."""
        answers = [row.answer for row in self.prompts]
        if not answers or any(answer is None for answer in answers) or len(answers) != len(self.store):
            return None
        names = sorted({answer.strip() for answer in answers if answer is not None})
        if not 2 <= len(names) <= min(MAX_LABELS, len(answers) // 3):
            return None
        return Labels(names, [names.index(answer.strip()) for answer in answers if answer is not None])


def prepare(
    files: list[Path],
    encoder: Encoder,
    stem: Path,
    *,
    allow_lost: float = 0.01,
    keep_rows: bool = False,
    held_out: tuple[float, bool] | None = None,
) -> DataSet:
    """Reads, encodes and stores the rows of `files`; `stem` is where the token files go.

    `held_out` = (share, want) keeps only the rows that do (want) or do not fall into the held-out share; the choice
    depends on a row's text alone, so equal texts stay together, and rows that cannot be read count as not held out.
    Raises DataError when no row is usable or more than `allow_lost` of all rows in the files are lost here, naming the
    first faults.
    """
    summary, kept, digest = DataSummary(), [], hashlib.sha256()
    rows_read = 0

    def chosen() -> Iterator[Row | Fault]:
        nonlocal rows_read
        for row in read_rows(files):
            rows_read += 1
            if held_out is None or _is_held_out(row, held_out[0]) is held_out[1]:
                summary.rows += 1
                yield row

    def examples() -> Iterator[Example]:
        previous = None
        for item in encode_rows(encoder, chosen()):
            if isinstance(item, Fault):
                summary.lost += 1
                summary.faults += [item] if len(summary.faults) < _FAULTS_KEPT else []
                continue
            row, example = item
            summary.used += row is not previous
            summary.cut += example.cut
            previous = row
            digest.update(len(example.tokens).to_bytes(8, "big") + example.tokens.tobytes() + example.weights.tobytes())
            if keep_rows:
                kept.append(row)
            yield example

    store = TokenStore.write(stem, examples())
    summary.digest = digest.hexdigest()
    summary.tokens, summary.trained_tokens = store.tokens, store.trained_tokens
    summary.longest_tokens = int(store.lengths.max()) if len(store) else 0
    _refuse_losses(summary, rows_read, allow_lost)
    return DataSet(store, summary, kept)


def _is_held_out(row: Row | Fault, below: float) -> bool:
    return isinstance(row, Row) and share_of(row) < below


def _refuse_losses(summary: DataSummary, rows_read: int, allow_lost: float) -> None:
    faults = bullet_list([str(fault) for fault in summary.faults], limit=10)
    if summary.rows == 0:
        raise DataError("The data holds no rows.")
    if summary.used == 0:
        raise DataError(f"None of the {summary.rows} rows can be used:\n{faults}")
    share = summary.lost / rows_read
    if share > allow_lost:
        enough = math.ceil(share * 1000) / 1000
        raise DataError(
            f"{summary.lost} of {rows_read} rows ({share:.1%}) cannot be used, more than the allowed {allow_lost:.1%}:"
            f"\n{faults}\nMend them, or allow the loss with --allow-lost {enough:.3f}."
        )


def share_of(row: Row) -> float:
    """A number in [0, 1) from the row's text alone: rows with equal text get the same."""
    text = row.text if row.text is not None else json.dumps([row.messages, row.tools], sort_keys=True)
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def held_out_share(files: list[Path], share: float = 0.05, most: int = 500) -> float:
    """The threshold of `share_of` below which a row is held out: `share` of the rows, at least one, at most `most`.

    Equal texts are never parted, so where they are many, fewer rows are held out, or as many as one text has. 0, and
    nothing held out, where all texts are equal.
    """
    places = sorted(share_of(row) for row in read_rows(files) if isinstance(row, Row))
    wanted = min(most, max(1, round(share * len(places))))
    borders = [index for index in range(1, len(places)) if places[index - 1] < places[index]]
    if not borders:
        return 0.0
    return places[max([index for index in borders if index <= wanted], default=borders[0])]
