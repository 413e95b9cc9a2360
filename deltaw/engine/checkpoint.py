"""A checkpoint is one file: tensors and state as safetensors, then the sha256 of all that. No pickle.

It is written under a temporary name, fsynced and renamed, so it is whole or absent; resume takes the newest whose
checksum is right and says which it skipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from deltaw.adapter.files import save_tensors
from deltaw.disk import disk_errors, new_file, sha256_file

_MAGIC = b"deltaw01"
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
    found = [path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint; ValueError when it is damaged."""
    content = path.read_bytes()
    payload, digest, magic = content[:-40], content[-40:-8], content[-8:]
    if magic != _MAGIC or hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"{path.name} is damaged (its checksum is wrong)")
    length = int.from_bytes(payload[:8], "little")
    state = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["state"])
    return safetensors.torch.load(payload), state


def newest_checkpoint(folder: Path) -> tuple[tuple[dict[str, Tensor], dict[str, Any]] | None, list[str]]:
    """The newest checkpoint that verifies (None when there is none), and what was skipped and why."""
    skipped: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return read_checkpoint(path), skipped
        except (ValueError, KeyError, OSError, safetensors.SafetensorError) as error:
            skipped.append(str(error))
    return None, skipped
