"""A base folder and an adapter → a merged model folder, one shard in memory at a time.

The sum is formed in fp32 from the stored weights and rounded once to their dtype. Nothing else of the folder changes,
except that a head which was tied to the embedding and got its own adapter is written as a weight of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from deltaw.adapter import Adapter, choose_for
from deltaw.adapter.layer import Target
from deltaw.adapter.merge import merged_weight
from deltaw.base.load import Base
from deltaw.disk import new_folder, write_text
from deltaw.errors import AdapterError

_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


def write_merged(base: Base, adapter: Adapter, out: Path) -> None:
    """Writes the base with the adapter folded in to the new folder `out`, complete or not at all.

    Raises AdapterError when the folder exists or its weights are stored under other names than the model's.
    """
    if out.exists():
        raise AdapterError(f"{out} exists already and is never overwritten; choose another --out.")
    shards = sorted(base.folder.glob("*.safetensors"))
    targets = {_weight_name(target): target for target in choose_for(base.model, adapter)}
    names = {shard.name: _names(shard) for shard in shards}
    stored = {name for shard_names in names.values() for name in shard_names}
    tied = _tied_targets(base, targets, stored)
    missing = [name for name in targets if name not in stored and name not in tied]
    if missing:
        raise AdapterError(
            f"{base.folder} stores its weights under other names than the model has ({missing[0]} and {len(missing) - 1} more "
            "are missing), so it cannot be merged shard by shard. Save it once with model.save_pretrained and merge that."
        )
    with new_folder(out) as temporary:
        for pattern in _COPIED:
            for file in base.folder.glob(pattern):
                shutil.copy(file, temporary / file.name)
        for number, shard in enumerate(shards):
            extra = tied if number == 0 else {}
            _write_shard(shard, temporary / shard.name, targets, adapter, extra)
        _describe(temporary, tied, shards[0].name)


def _weight_name(target: Target) -> str:
    return target.name if target.kind.startswith("parameter") else f"{target.name}.{target.parameter}"


def _names(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as file:
        return list(file.keys())


def _tied_targets(base: Base, targets: dict[str, Target], stored: set[str]) -> dict[str, str]:
    """{weight that gets its own tensor: stored weight it was tied to}: adapting one of two tied layers parts them.

    A missing head takes the embedding's weight; when the embedding itself is adapted, the head keeps the old one.
    """
    config = base.model.config
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    modules = {module: name for name, module in base.model.named_modules()}
    head = modules[base.model.get_output_embeddings()] + ".weight"
    embedding = modules[base.model.get_input_embeddings()] + ".weight"
    if head not in stored and (head in targets or embedding in targets):
        return {head: embedding}
    return {}


def _write_shard(shard: Path, out: Path, targets: dict[str, Target], adapter: Adapter, tied: dict[str, str]) -> None:
    tensors: dict[str, Tensor] = {}
    with safe_open(shard, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensors[name] = _merged(file.get_tensor(name), targets.get(name), adapter)
        for name, source in tied.items():
            tensors[name] = _merged(file.get_tensor(source), targets.get(name), adapter)
    safetensors.torch.save_file(tensors, out, metadata={"format": "pt"})


@torch.no_grad()
def _merged(stored: Tensor, target: Target | None, adapter: Adapter) -> Tensor:
    if target is None:
        return stored
    holder = _Holder(target, stored)
    return merged_weight(holder.target, adapter).to(stored.dtype)


class _Holder(torch.nn.Module):
    """Lets a target's formula see a stored tensor instead of the live one, which may have another dtype."""

    def __init__(self, target: Target, stored: Tensor) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        fields: dict[str, Any] = {**vars(target), "holder": self, "parameter": "stored"}
        self.target = Target(**fields)


def _describe(folder: Path, tied: dict[str, str], first_shard: str) -> None:
    if not tied:
        return
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part or part is config:
            part["tie_word_embeddings"] = False
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text("utf-8"))
        content["weight_map"] |= dict.fromkeys(tied, first_shard)
        write_text(index, json.dumps(content, indent=2) + "\n")
