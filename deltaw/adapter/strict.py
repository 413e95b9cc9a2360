"""Files of strangers, read with bounds: JSON without repeated keys, and the header of a safetensors file.

json and safetensors take the last of two equal keys, and neither minds how much it is given: a header of 250,000 empty
tensors cost 4 seconds and 0.5 GB before the first of them could be refused. Here the size is asked first. Nothing is
interpreted; every fault of a file is a ValueError whose text says what is wrong, and a disk that fails is a DiskError.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deltaw.disk import disk_errors

MAX_HEADER_BYTES, MAX_TENSORS = 8 << 20, 50_000  # an adapter of 48 layers of 128 experts has 6 MB and 37,000


def read_json(path: Path, most_bytes: int) -> Any:
    """The value in a JSON file of at most `most_bytes`; ValueError when it is larger, damaged, or names a key twice."""
    with disk_errors("read", path), path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return _parse(content)


def check_header(path: Path) -> None:
    """ValueError when a safetensors file's header is too large, repeats a key or holds a tensor without numbers."""
    with disk_errors("read", path), path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError(f"its header would have {length:,} bytes, of a file of {size_bytes:,}")
        content = file.read(length)
    _check_count(content.count(b'"data_offsets"'))  # before it is parsed, which takes a second for each 100,000
    header = _parse(content)
    if not isinstance(header, dict):
        raise ValueError(f"its header must be an object, not {type(header).__name__}")
    _check_count(len(header))
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if name != "__metadata__" and isinstance(shape, list) and 0 in shape:
            raise ValueError(f"tensor {name[:200]!r} has the shape {shape[:8]}: no numbers at all")


def _check_count(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise ValueError(f"it has {tensors:,} tensors; an adapter has at most {MAX_TENSORS:,}")


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it has the key {twice[:200]!r} more than once")
    return found
