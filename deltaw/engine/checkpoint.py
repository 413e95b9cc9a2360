"""A checkpoint is one file: tensors and state as safetensors, then the sha256 of all that. No pickle.

It is written under a temporary name, fsynced and renamed, so it is whole or absent; resume takes the newest whose
checksum is right and says which it skipped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter.files import DTYPES, save_tensors
from deltaw.disk import disk_errors, new_file, sha256_file
from deltaw.errors import DiskError

_MAGIC = b"deltaw01"
_PART = 1 << 20
_END = 32 + len(_MAGIC)  # bytes behind the tensors: their sha256, then this
_NAME = re.compile(r"step-(\d{8})\.ckpt")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step` and keeps `keep - 1` of those before it. Raises DiskError; older ones then stay.

    One of a later step goes as well: it must be damaged, or the run would have gone on from there.
    """
    with disk_errors("make", folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.ckpt"
    with new_file(path) as temporary:  # written from where the tensors lie: a copy of them may be too much
        save_tensors(tensors, temporary, state=json.dumps(state))
        digest = bytes.fromhex(sha256_file(temporary))
        with temporary.open("ab") as file:
            file.write(digest + _MAGIC)
    found = list_checkpoints(folder)
    later, before = [each for each in found if each > path], [each for each in found if each < path]
    for old in [*later, *before[keep - 1 :]]:
        with disk_errors("remove", old):
            old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first, good or not."""
    with disk_errors("read", folder):  # not by `glob`, which takes a folder that may not be read for an empty one
        found = list(folder.iterdir()) if folder.exists() else []
        return sorted((path for path in found if _NAME.fullmatch(path.name) and not path.is_dir()), reverse=True)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint; ValueError when it is damaged, DiskError when it cannot be read.

    The tensors lie in the mapped file: resuming takes no memory that training does not.
    """
    with disk_errors("read", path), path.open("rb") as file:
        size, found = path.stat().st_size - _END, hashlib.sha256()
        for start in range(0, size, _PART):  # read and not mapped, where a failing disk would end the process
            found.update(file.read(min(_PART, size - start)))
        if size <= 0 or file.read() != found.digest() + _MAGIC:
            raise ValueError(f"{path.name} is damaged (its checksum is wrong)")
        payload = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[:size]
    start = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(bytes(payload[8:start]))
    state = json.loads(header.pop("__metadata__")["state"])
    return {name: _tensor(payload[start:], **entry) for name, entry in header.items()}, state


def _tensor(numbers: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    begin, end = data_offsets
    if begin == end:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(numbers[begin:end], dtype=DTYPES[dtype]).view(shape)


def newest_checkpoint(folder: Path) -> tuple[tuple[dict[str, Tensor], dict[str, Any]] | None, list[str]]:
    """The newest checkpoint that verifies (None when there is none), and what was skipped and why.

    DiskError when one cannot be read: it may be good, and going on from an older one would remove it.
    """
    skipped: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return read_checkpoint(path), skipped
        except DiskError:
            raise
        except (ValueError, KeyError) as error:
            skipped.append(str(error))
    return None, skipped
