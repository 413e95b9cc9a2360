"""Files → records, without guessing types: what a record holds is what the file says.

Containers: JSON lines, a JSON array, CSV and TSV, Parquet, Arrow files and folders, plain text; the text ones also
gzipped or as .zst; data sets of the hub. Rows are numbered from 1. What cannot be read becomes a Fault that names file
and row; it never ends the reading and is never dropped silently. What a record means is deltaw/data/formats.py.
"""

from __future__ import annotations

import csv
import glob
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from deltaw.config import HUB
from deltaw.errors import DataError, bullet_list

TEXT_ENDINGS = (".txt", ".md")
LINE_ENDINGS = (".jsonl", ".ndjson", ".json")
TABLE_ENDINGS = {".csv": ",", ".tsv": "\t"}
ARROW_ENDINGS = (".parquet", ".arrow")
PACKED_ENDINGS = (".gz", ".zst")
OTHER_DELIMITERS = (";", "\t", "|", ",")
KNOWN = "Give .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt, the text ones also as .gz or .zst; or hub:NAME."
_DAMAGE = (OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Record:
    """One row as the file has it; `typed` says that an Arrow schema may have added keys with nothing in them."""

    file: str
    number: int
    value: Any
    typed: bool = False


@dataclass(frozen=True)
class Fault:
    """One row that cannot be used: the reason, and the name of the finding that it is (deltaw/data/findings.py)."""

    file: str
    number: int
    reason: str
    code: str = "unreadable"

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}: {self.reason}"


ONLY_SPLIT = "train"


@dataclass(frozen=True)
class Source:
    """One entry of `data`: files (or a data set of the hub) with what is to be done with them.

    Each of its rows appears `weight` times an epoch; no more than `cap` rows are taken; `columns` renames, canonical
    name → name in the file. Written FILE or FILE::weight=2,cap=1000,prompt=question.
    """

    name: str
    weight: float = 1.0
    cap: int | None = None
    split: str = ONLY_SPLIT
    config: str | None = None
    columns: tuple[tuple[str, str], ...] = field(default=())

    @property
    def files(self) -> list[Path]:
        """The files it stands for, in order; empty for a data set of the hub. Raises DataError."""
        return [] if self.name.startswith(HUB) else find_files([self.name])


def parse_source(text: str, columns: Iterable[tuple[str, str]] = (), known: Iterable[str] = ()) -> Source:
    """A Source from its text; `columns` are renamings for all sources. Raises DataError naming what is wrong.

    `known` are the canonical names of columns.
    """
    name, _, options = text.partition("::")
    values: dict[str, Any] = {}
    renamed = dict(columns)
    faults = []
    for option in filter(None, options.split(",")):
        key, equals, value = (part.strip() for part in option.partition("="))
        try:
            if not equals or not value:
                raise ValueError("must look like key=value")
            if "::" in value:
                raise ValueError("options are separated by commas, as in ::config=en,split=train")
            if key in known:
                renamed[key] = value
            else:
                values[key] = _OPTIONS[key](value)
        except KeyError:
            faults.append(f"{key!r} is none of {', '.join([*_OPTIONS, *known])}")
        except ValueError as error:
            faults.append(f"{option!r}: {error}")
    if faults:
        raise DataError(f"The data source {text!r} cannot be understood:\n" + bullet_list(faults))
    return Source(name, columns=tuple(sorted(renamed.items())), **values)


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < 1e6:
        raise ValueError("must be above 0")
    return number


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError("must be a whole number above 0")
    return number


_OPTIONS: dict[str, Any] = {"weight": _positive, "cap": _count, "split": str, "config": str}


def find_files(patterns: list[str]) -> list[Path]:
    """The files and Arrow folders that names and globs stand for, in order; DataError names all that stand for none."""
    found: list[Path] = []
    missing = []
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = [expanded] if Path(expanded).exists() else sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207
        files = [Path(match) for match in matches if Path(match).is_file() or _is_arrow_folder(Path(match))]
        missing += [] if files else [pattern]
        found += [file.resolve() for file in files]
    if missing:
        raise DataError("No such data file: " + ", ".join(missing) + f" — {KNOWN}")
    return found


def _is_arrow_folder(path: Path) -> bool:
    """Whether `datasets` saved a data set, or one with several splits, into this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def content_files(source: Source) -> list[Path]:
    """Every file whose content decides what a source says: those of Arrow folders too."""
    files: list[Path] = []
    for path in source.files:
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return files


# -- reading -----------------------------------------------------------------------------------------------------------


def read_source(source: Source) -> Iterator[Record | Fault]:
    """Every record of a source in order, up to its cap. Raises DataError for what cannot be opened at all."""
    if source.name.startswith(HUB):
        records = _read_hub(source)
    else:
        records = (record for file in source.files for record in read_file(file, source.split))
    for taken, record in enumerate(records):
        if source.cap is not None and taken >= source.cap:
            return
        yield record


def read_file(file: Path, split: str = ONLY_SPLIT) -> Iterator[Record | Fault]:
    """Every record of a file, readable or not. Raises DataError for a file that cannot be opened at all."""
    if file.is_dir():
        yield from _read_arrow_folder(file, split)
        return
    if split != ONLY_SPLIT:
        raise DataError(f"{file} is one file and has no split {split!r}: leave out ::split=….")
    name = file.name.lower()
    plain = name.removesuffix(next((ending for ending in PACKED_ENDINGS if name.endswith(ending)), ""))
    ending = Path(plain).suffix
    if ending in TEXT_ENDINGS:
        yield _read_text(file)
    elif ending in LINE_ENDINGS:
        yield from _read_json(file, ending)
    elif ending in TABLE_ENDINGS:
        yield from _read_table(file, TABLE_ENDINGS[ending])
    elif ending in ARROW_ENDINGS and plain == name:
        yield from _read_arrow(file, [file])
    else:
        raise DataError(f"{file}: unknown kind of file. {KNOWN}")


def _open(file: Path) -> AbstractContextManager[BinaryIO]:
    """The bytes of a file, unpacked."""
    name = file.name.lower()
    if name.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        return _arrow(file).input_stream(str(file), compression="zstd")
    return file.open("rb")


def _arrow(file: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(f"Reading {file.name} needs pyarrow: pip install pyarrow") from error


def _read_text(file: Path) -> Record | Fault:
    try:
        with _open(file) as content:
            text = content.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return Fault(file.name, 1, f"not valid UTF-8 ({error})")
    except _DAMAGE as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return Record(file.name, 1, {"text": text}) if text.strip() else Fault(file.name, 1, "the file is empty")


def _read_json(file: Path, ending: str) -> Iterator[Record | Fault]:
    number = 0
    try:
        with _open(file) as content:
            lines: Any = content if hasattr(content, "peek") else io.BufferedReader(content)
            if ending == ".json" and _begins_with_bracket(lines):
                yield from _read_array(file, lines.read())
                return
            for number, line in enumerate(lines, 1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    yield _object(file.name, number, _parse(file.name, number, line))
    except _DAMAGE as error:
        raise DataError(f"{file} cannot be read behind row {number}: {error}") from error


def _begins_with_bracket(lines: Any) -> bool:
    return lines.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _read_array(file: Path, content: bytes) -> Iterator[Record | Fault]:
    whole = _parse(file.name, 1, content)
    if isinstance(whole, Fault):
        yield whole
    else:
        yield from (_object(file.name, number, value) for number, value in enumerate(whole, 1))


def _parse(file: str, number: int, text: bytes) -> Any:
    """The value of a JSON text, or the Fault that it is none."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if b"\\u" in text:  # JSON may spell half of a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:  # a line number within the row would only confuse
        return Fault(file, number, f"not valid JSON ({error.msg}, at character {error.pos + 1} of {len(error.doc):,})")
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return Fault(file, number, f"not valid JSON ({error})")
    return value


def _object(file: str, number: int, value: Any) -> Record | Fault:
    if isinstance(value, Fault):
        return value
    if isinstance(value, dict):
        return Record(file, number, value)
    return Fault(file, number, f"a row must be an object, not {type(value).__name__}")


def _read_table(file: Path, delimiter: str) -> Iterator[Record | Fault]:
    """Rows of a CSV or TSV file with a header; an empty cell says nothing. Values are text, whatever they look like."""
    csv.field_size_limit(1 << 27)
    number = 0
    try:
        with _open(file) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            header = next(rows, None)
            if not header or len(set(header)) < len(header) or not all(header):
                raise DataError(f"{file} needs a first line that names its columns, each once; it has {header}.")
            if len(header) == 1 and (found := [mark for mark in OTHER_DELIMITERS if mark in header[0]]):
                raise DataError(
                    f"{file} has the single column {header[0]!r}. If {found[0]!r} parts columns there, save it with "
                    f"{delimiter!r} instead."
                )
            for number, cells in enumerate(rows, 1):
                if not cells:  # an empty line
                    continue
                if len(cells) != len(header):
                    yield Fault(file.name, number, f"it has {len(cells)} cells, the header {len(header)}")
                else:
                    value = {name: cell or None for name, cell in zip(header, cells, strict=True)}
                    yield Record(file.name, number, value, typed=True)
    except (UnicodeDecodeError, csv.Error) as error:  # where it goes on is not known, so all the rest would be lost
        raise DataError(
            f"{file} cannot be read behind row {number}: {error}. Save it as UTF-8, with quotes inside a cell doubled."
        ) from error
    except _DAMAGE as error:
        raise DataError(f"{file} cannot be read behind row {number}: {error}") from error


def _read_arrow_folder(folder: Path, split: str) -> Iterator[Record | Fault]:
    """A data set as `datasets` saves it; of one with several splits, the one asked for."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r}; give {folder}::split=… with one of {', '.join(splits)}.")
        folder = folder / split
    elif split != ONLY_SPLIT:
        raise DataError(f"{folder} is one data set and has no split {split!r}: leave out ::split=….")
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        shards = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no readable Arrow folder: {error}") from error
    yield from _read_arrow(folder, shards)


def _read_arrow(shown: Path, shards: list[Path]) -> Iterator[Record | Fault]:
    arrow, number = _arrow(shown), 0
    try:
        for shard in shards:
            for batch in _arrow_batches(arrow, shard):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(shown.name, number, value, typed=True)
    except (arrow.ArrowException, *_DAMAGE, UnicodeDecodeError) as error:
        raise DataError(f"{shown} cannot be read behind row {number}: {error}") from error


def _arrow_batches(arrow: Any, shard: Path) -> Iterator[Any]:
    if shard.suffix.lower() == ".parquet":
        with importlib.import_module("pyarrow.parquet").ParquetFile(shard) as file:
            yield from file.iter_batches(batch_size=1024)
        return
    with arrow.memory_map(str(shard)) as mapped:
        try:
            yield from arrow.ipc.open_stream(mapped)
        except arrow.ArrowInvalid:
            file = arrow.ipc.open_file(mapped)
            yield from (file.get_batch(index) for index in range(file.num_record_batches))


def _read_hub(source: Source) -> Iterator[Record | Fault]:
    """Rows of a data set of the hub, or of a folder as the hub has it, streamed; no code of it is run."""
    name = source.name.removeprefix(HUB)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"Reading {source.name} needs datasets: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, source.config, split=source.split, streaming=True)
        yield from (Record(name, number, value, typed=True) for number, value in enumerate(rows, 1))
    except Exception as error:  # the library raises a wide family; its own sentence is the useful part
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"Could not read {source.name}: {first_line} Give a local file if you have it already."
        ) from error
