"""Sources → a DataSet: every row read, encoded, checked and stored once; the same rows a second time come from a cache.

A cache entry is named by the content of the files and by all that decides which tokens they give (template, tokenizer,
mask, length), so a changed template or row can never meet old tokens. Rows are streamed: what is held in memory is a
few numbers per row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.config import HUB
from deltaw.data.encoding import Encoding
from deltaw.data.example import Example
from deltaw.data.findings import ROW, Findings
from deltaw.data.formats import Row, read_rows
from deltaw.data.source import Fault, Source, content_files
from deltaw.data.store import TokenStore
from deltaw.disk import disk_errors, new_folder, remembered_digest, write_text
from deltaw.errors import DataError, bullet_list

if TYPE_CHECKING:
    from deltaw.data.chat import Encoder

MAX_LABELS = 20
STALE_SECONDS, LEFT_SECONDS = 30 * 86_400, 86_400
REPORT, SHARES = "report.json", "all.shares"
Progress = Callable[[int], None]


@dataclass
class DataReport:
    """What became of the rows of a data set. Counts are of rows, not of pieces of them.

    `used` rows gave examples, `lost` ones are Faults, `skipped` ones are not meant to be trained (bad answers of
    judged pairs), `cut` ones lost their end. `formats` counts rows by file and format.
    """

    rows: int = 0
    used: int = 0
    lost: int = 0
    skipped: int = 0
    cut: int = 0
    formats: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    digest: str = ""
    source_documents: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "findings": self.findings.as_list()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], allow: Collection[str]) -> DataReport:
        """What `as_dict` gave."""
        return cls(**{**values, "findings": Findings.from_list(values["findings"], allow)})

    def errors(self) -> list[str]:
        """Examples of what made rows unusable, at most ten."""
        return [text for found in self.findings.errors() for text in found.examples][:10]


@dataclass
class Labels:
    """The answers of a data set that is a choice among few: `names`, and each document's own as an index."""

    names: list[str]
    of_document: list[int]


@dataclass
class DataSet:
    """Documents ready for training or evaluation. `shares` places each row's text in [0, 1): equal texts lie together.

    `mix` says for each source how many of the documents are its own (they lie in the order of the sources) and how
    often each appears in an epoch. `prompts` are the rows of the documents, kept for evaluation only.
    """

    store: TokenStore
    report: DataReport
    shares: np.ndarray
    mix: list[tuple[int, float]]
    prompts: list[Row] = field(default_factory=list)
    stored_digest: str = ""  # of all documents in the token files, of which these may be a part

    @property
    def identity(self) -> str:
        """A digest of the documents and of how often each is taken: what a run that goes on must find again."""
        if all(weight == 1 for _, weight in self.mix):
            return self.report.digest
        return hashlib.sha256(f"{self.report.digest} {self.mix}".encode()).hexdigest()

    def turns(self, epochs: float | None) -> float:
        """How often a document may be taken at most; `epochs` None for a run that data does not end."""
        most = max((weight for _, weight in self.mix), default=1.0)
        return math.inf if epochs is None else max(1.0, math.ceil(epochs) * math.ceil(most))

    def split(self, below: float) -> tuple[DataSet, DataSet]:
        """(the documents at or above a share, those below it); a text and its copies stay together."""
        return self._part(self.shares >= below, f"from {below!r}"), self._part(self.shares < below, f"below {below!r}")

    @property
    def row_shares(self) -> np.ndarray:
        """The share of each row, once, however many pieces it was cut into."""
        if not len(self.shares):
            return self.shares
        begins = (np.diff(self.store.rows) != 0) | (np.diff(self.shares) != 0)
        return self.shares[np.append(True, begins)]

    def _part(self, wanted: np.ndarray, name: str) -> DataSet:
        borders = np.cumsum([0, *(count for count, _ in self.mix)])
        counts = [int(wanted[a:b].sum()) for a, b in pairwise(borders)]
        mix = [(count, weight) for count, (_, weight) in zip(counts, self.mix, strict=True)]
        chosen = np.flatnonzero(wanted)
        digest = hashlib.sha256(f"{self.report.digest} {name}".encode()).hexdigest()
        prompts = [self.prompts[i] for i in chosen] if self.prompts else []
        report = replace(self.report, digest=digest)
        return DataSet(self.store.view(chosen), report, self.shares[chosen], mix, prompts, self.stored_digest)

    def as_dict(self) -> dict[str, Any]:
        """The counts of these documents, for JSON and for the report page."""
        store, rows = self.store, len(self.row_shares)
        return {
            "used": rows,
            "documents": len(store),
            "tokens": store.tokens,
            "trained_tokens": store.trained_tokens,
            "longest_tokens": int(store.lengths.max()) if len(store) else 0,
            "digest": self.report.digest,
        }

    def labels(self) -> Labels | None:
        """The answers as labels, when there are 2 to 20 different ones and on average 3 rows or more for each."""
        answers = [row.answer for row in self.prompts]
        if not answers or any(answer is None for answer in answers) or len(answers) != len(self.store):
            return None
        if self.store[0].weights[0] > 0:  # every token is trained, so where its answer begins is not known
            return None
        names = sorted({answer.strip() for answer in answers if answer is not None})
        if not 2 <= len(names) <= min(MAX_LABELS, len(answers) // 3):
            return None
        return Labels(names, [names.index(answer.strip()) for answer in answers if answer is not None])


def prepare(
    sources: Sequence[Source | Path],
    encoder: Encoding,
    folder: Path,
    *,
    keep_rows: bool = False,
    refuse_above: float | None = 0.01,
    progress: Progress | None = None,
) -> DataSet:
    """Every row of the sources, encoded and checked; `folder` holds the token files, an entry for each content.

    `keep_rows` also returns the rows, and so reads them again. Raises DataError when no row is usable, when an error of
    the set was found, or when more than `refuse_above` of the rows are lost (None: never), with the first faults.
    """
    listed = [Source(str(source)) if isinstance(source, Path) else source for source in sources]
    entry = folder / cache_key(listed, encoder)
    kept: list[Row] = []
    if keep_rows or not _is_whole(entry):
        _build(entry, listed, encoder.ready(), kept if keep_rows else None, progress)
    data = _open(entry, listed, encoder, kept)
    if refuse_above is not None:
        refuse(data.report, refuse_above)
    return data


def cache_key(sources: Sequence[Source], encoder: Encoding) -> str:
    """The name of an entry. A data set of the hub is named by its name alone, and so read anew each time."""
    parts: list[Any] = [encoder.digest]
    for source in sources:
        files = content_files(source)
        if closed := [str(file) for file in files if not os.access(file, os.R_OK)]:
            raise DataError(f"These data files may not be read: {', '.join(closed)}.")
        digests = [[file.name, remembered_digest(file)] for file in files] if files else [time.time_ns()]
        parts.append([source.name.startswith(HUB), digests, source.cap, source.split, source.config, source.columns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _is_whole(entry: Path) -> bool:
    """Whether an entry is there with all of its files in their full length; what is not is made anew."""
    if not (entry / REPORT).is_file():
        return False
    try:
        json.loads((entry / REPORT).read_text("utf-8"))
        return (entry / SHARES).stat().st_size == 8 * len(TokenStore(entry / "all"))
    except (OSError, ValueError, IndexError):
        return False


def _open(entry: Path, sources: Sequence[Source], encoder: Encoding, kept: list[Row]) -> DataSet:
    with disk_errors("open", entry):
        report = DataReport.from_dict(json.loads((entry / REPORT).read_text("utf-8")), encoder.allow)
        with contextlib.suppress(OSError):  # another user's: it may be read all the same
            os.utime(entry)  # what is used stays in the cache
        shares = np.fromfile(entry / SHARES, np.float64)
    mix = [(count, source.weight) for count, source in zip(report.source_documents, sources, strict=True)]
    return DataSet(TokenStore(entry / "all"), report, shares, mix, kept, report.digest)


def _build(
    entry: Path, sources: Sequence[Source], encoder: Encoder, kept: list[Row] | None, progress: Progress | None
) -> None:
    _forget_stale(entry.parent)
    scan = _Scan(encoder, kept, progress)
    with new_folder(entry) as temporary:
        TokenStore.write(temporary / "all", scan.examples(sources))
        np.asarray(scan.shares, np.float64).tofile(temporary / SHARES)
        write_text(temporary / REPORT, json.dumps(scan.finish().as_dict()))


def _forget_stale(folder: Path) -> None:
    """Removes entries that nobody has used for a month; a process that still maps one keeps its pages."""
    entries = [(report.parent, STALE_SECONDS) for report in folder.glob("*/" + REPORT)]
    # Begun by a process that was killed, or is still writing.
    entries += [(path, LEFT_SECONDS) for path in folder.glob(".*") if path.is_dir()]
    for entry, most in entries:
        with contextlib.suppress(OSError):  # another process removes or renames it just now
            parts = [entry, *entry.rglob("*")] if most == LEFT_SECONDS else [entry]
            if time.time() - max(part.stat().st_mtime for part in parts) > most:
                shutil.rmtree(entry, ignore_errors=True)


class _Scan:
    """One pass over the rows: examples go out, counts and findings stay."""

    def __init__(self, encoder: Encoder, kept: list[Row] | None, progress: Progress | None) -> None:
        self.encoder, self.kept, self.progress = encoder, kept, progress
        self.report = DataReport(findings=Findings(encoder.allow))
        self.shares = array("d")
        self._rows, self._row_shares = array("q"), array("d")
        self._files: list[tuple[int, str]] = []
        self._formats: dict[str, Counter[str]] = defaultdict(Counter)
        self._digest = hashlib.sha256()
        self._trained = self._tokens = 0
        self._started = time.monotonic()

    def examples(self, sources: Sequence[Source]) -> Iterator[Example]:
        """Every example of the sources, in order."""
        for source in sources:
            before, rows_before = len(self.shares), self.report.rows
            for found in self.encoder.encode_many(read_rows([source])):
                self.report.rows += 1
                if self.progress is not None and self.report.rows % 256 == 0:
                    self.progress(self.report.rows)
                if isinstance(found, Fault):
                    self.report.lost += 1
                    self.report.findings.add(found.code, found.file, found.number, found.reason)
                    continue
                yield from self._use(found.row, found.examples, found.notes)
            if self.report.rows == rows_before:
                self.report.findings.add("empty-source", what=source.name.rpartition("/")[2])
            self.report.source_documents.append(len(self.shares) - before)

    def _use(self, row: Row, examples: list[Example], notes: Iterable[tuple[str, str]]) -> Iterator[Example]:
        self._formats[row.file][row.format or "text"] += 1
        for code, what in notes:
            self.report.findings.add(code, row.file, row.number, what)
        if row.skip is not None:
            self.report.skipped += 1
            return
        self.report.used += 1
        share = share_of(row)
        if not self._files or self._files[-1][1] != row.file:
            self._files.append((len(self._rows), row.file))
        self._rows.append(row.number)
        self._row_shares.append(share)
        self.report.cut += any(example.cut for example in examples)
        for example in examples:
            self.shares.append(share)
            self._tokens += len(example.tokens)
            self._trained += int(np.count_nonzero(example.weights))
            self._digest.update(example.as_bytes())
            if self.kept is not None:
                self.kept.append(row)
            yield replace(example, file=row.file)

    def finish(self) -> DataReport:
        """The report, with what only shows in the whole set."""
        report = self.report
        report.formats = {file: dict(counts) for file, counts in self._formats.items()}
        for file, counts in report.formats.items():
            if len(counts) > 1:
                shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
                report.findings.add("mixed-formats", file, what=shown)
        if not report.used:
            report.findings.add("no-rows", what=f"{report.rows:,} rows were read")
        if report.used and (words := self.encoder.foreign_words()):
            report.findings.add("foreign-template", what=", ".join(words))
        if self._tokens and self._trained < 0.01 * self._tokens:
            report.findings.add("mostly-context", what=f"{self._trained:,} of {self._tokens:,} tokens are trained")
        self._find_duplicates()
        report.digest, report.seconds = self._digest.hexdigest(), time.monotonic() - self._started
        return report

    def _find_duplicates(self) -> None:
        shares = np.asarray(self._row_shares)
        order = np.argsort(shares, kind="stable")
        ordered = shares[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        for place in np.sort(order[again]):
            first = order[np.searchsorted(ordered, shares[place])]
            file, row = self._place(int(place))
            self.report.findings.add("duplicate", file, row, "equal to {}, row {}".format(*self._place(int(first))))

    def _place(self, index: int) -> tuple[str, int]:
        file = self._files[bisect_right(self._files, index, key=lambda entry: entry[0]) - 1][1]
        return file, self._rows[index]


SAID = {
    *("role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls", "name", "tool_call_id"),
}  # of a message


def share_of(row: Row) -> float:
    """A number in [0, 1) from what the row says, and not from what is noted beside it: equal rows get the same."""
    if row.text is not None:
        text = row.text
    else:
        said = [{key: value for key, value in message.items() if key in SAID} for message in row.messages]
        text = json.dumps([said, row.tools, row.tokens, row.labels], sort_keys=True, default=str)
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def held_out_share(shares: np.ndarray, share: float = 0.05, most: int = 500) -> float:
    """The threshold below which a row is held out: `share` of the rows, at least one, at most `most`.

    `shares` are those of the rows (`share_of`). Equal texts are never parted, so where they are many, fewer rows are
    held out, or as many as one text has. 0, and nothing held out, where all texts are equal.
    """
    places = np.sort(shares)
    wanted = min(most, max(1, round(share * len(places))))
    borders = np.flatnonzero(places[1:] > places[:-1]) + 1
    if not len(borders):
        return 0.0
    fitting = borders[borders <= wanted]
    return float(places[fitting[-1] if len(fitting) else borders[0]])


def refuse(report: DataReport, allow_lost: float) -> None:
    """Raises DataError when a report says that training on this data would go wrong; the message lists all reasons."""
    if report.rows == 0:
        raise DataError("The data holds no rows.")
    if report.used == 0:
        raise DataError(f"None of the {report.rows} rows can be used:\n" + bullet_list(report.errors(), 10))
    if faults := report.findings.errors_of_the_set():
        listed = [f"{f.count:,} {f.kind.title} ({f.examples[0]}). {f.kind.advice}" for f in faults]
        codes = " ".join(f"--allow {found.code}" for found in faults)
        raise DataError(f"Training on this data would go wrong:\n{bullet_list(listed)}\nIf it is meant: {codes}.")
    excused = sum(
        found.count for found in report.findings if found.kind.severity == ROW and found.code in report.findings.allowed
    )
    share = max(0, report.lost - excused) / report.rows
    if share > allow_lost:
        enough = math.ceil(share * 1000) / 1000
        raise DataError(
            f"{report.lost} of {report.rows} rows ({share:.1%}) cannot be used, "
            f"more than the allowed {allow_lost:.1%}:\n{bullet_list(report.errors(), 10)}\n"
            f"Mend them, or allow the loss with --allow-lost {enough:.3f}."
        )
