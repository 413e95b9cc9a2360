"""A base folder and an adapter → a merged model folder, one shard in memory at a time.

The sum is formed in fp32 from the stored weights and rounded once to their dtype. Nothing else of the folder changes,
except that a head which was tied to the embedding is written as a weight of its own when either has an adapter. A base
that stores its weights in another layout than the model's (experts one by one, other names) is merged whole in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaw.adapter import Adapter, choose_for, merge_
from deltaw.adapter.files import save_tensors
from deltaw.adapter.layer import Target
from deltaw.adapter.merge import merged_weight
from deltaw.adapter.weight import stored_tensors
from deltaw.base.formed import INDEX, Stored, stored_weights
from deltaw.base.load import Base, open_model
from deltaw.base.locate import MORE_TEMPLATES
from deltaw.base.stream import release
from deltaw.disk import new_folder, require_new, write_text
from deltaw.errors import AdapterError, bullet_list, signals_kept
from deltaw.hardware import freed_at_once

_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", f"{MORE_TEMPLATES}/*.jinja")
_SUMMED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what a stored weight may be to be summed
_CONFIG = "config.json"


@freed_at_once()
def write_merged(base: Base, adapter: Adapter, out: Path) -> None:
    """Writes the base with the adapter folded in to the new folder `out`, complete or not at all.

    Raises UsageError when the folder exists, AdapterError when the adapter does not fit, DiskError
    when it cannot be written.
    """
    require_new(out)
    targets = {_weight_name(target): target for target in choose_for(base.model, adapter)}
    stored = stored_weights(base.folder)
    if coded := [name for name in targets if name in stored and stored[name].dtype not in _SUMMED]:
        listed = [f"{name} is stored as {str(stored[name].dtype).removeprefix('torch.')}" for name in coded]
        raise AdapterError(f"An adapter cannot be merged into weights that are stored as codes:\n{bullet_list(listed)}")
    parted = _parted_names(base, set(targets))
    release(stored_tensors(base.model))  # of which only shapes are asked from here
    same_layout = all(
        name in parted or (name in stored and stored[name].shape == target.shape) for name, target in targets.items()
    )
    with new_folder(out) as temporary:
        if same_layout and (not parted or any(name in stored for name in parted)):
            _copy_others(base.folder, temporary)
            _write_shards(base.folder, temporary, stored, _Merge(targets, adapter, parted))
        else:
            _write_whole(base.folder, temporary, adapter)
            _copy_others(base.folder, temporary, but=(_CONFIG, INDEX))


@freed_at_once()
@torch.no_grad()
def check_merged(folder: Path, adapter: Adapter, out: Path) -> int:
    """How many weights of the merged folder `out` carry the adapter, when every weight is what it must be.

    Both folders are opened as transformers opens them, in the dtype of most of their files, whatever config.json says.
    An adapted weight must be W + ΔW, formed in fp32, to half a unit in the last place; every other one must have the
    base's bits. Raises AdapterError naming each that does not.
    """
    written, usual = stored_weights(out), _usual_dtype(stored_weights(folder))
    base, merged = open_model(folder, usual), open_model(out, usual)
    targets = {_weight_name(target): target for target in choose_for(base, adapter)}
    stored, found = base.state_dict(), merged.state_dict()
    faults = [f"{name} is in one of the two folders only" for name in sorted(stored.keys() ^ found.keys())]
    for name in sorted(stored.keys() & found.keys()):
        if name in targets:
            dtypes = {usual, written[name].dtype if name in written else usual}
            if not _is_rounded(found[name], wanted := merged_weight(targets[name], adapter), dtypes):
                apart = float((found[name].float() - wanted).abs().max())
                faults.append(f"{name} is not W + ΔW rounded once: it is off by up to {apart:.2e}")
        elif not torch.equal(found[name], stored[name]):
            faults.append(f"{name} is not the base's, and has no update")
        release((found[name], stored[name]))
    if faults:
        raise AdapterError(
            f"The merged model in {out} is not the base with the adapter; do not use it.\n" + bullet_list(faults)
        )
    return len(targets)


def _is_rounded(found: Tensor, wanted: Tensor, dtypes: set[torch.dtype]) -> bool:
    """Whether `found` is the fp32 sum `wanted` rounded once to each of these dtypes: of its file, and as it was opened.

    Where they differ, W itself was rounded too when it was opened.
    """
    known = max((torch.finfo(dtype) for dtype in dtypes), key=lambda one: one.eps)
    rounding = len(dtypes) * known.eps / 2
    slack = 2 * torch.finfo(torch.float32).eps * float(wanted.abs().max())  # fp32 may have summed in another order
    slack += known.smallest_normal * rounding  # numbers below the smallest normal one lie this far apart
    return torch.allclose(found.float(), wanted, rtol=rounding, atol=slack)


def _weight_name(target: Target) -> str:
    return target.name if target.is_parameter else f"{target.name}.{target.parameter}"


def _usual_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The dtype of most of these numbers; codes are no numbers."""
    numbers: Counter[torch.dtype] = Counter()
    for each in stored.values():
        if each.dtype in _SUMMED:
            numbers[each.dtype] += math.prod(each.shape)
    return numbers.most_common(1)[0][0]


def _parted_names(base: Base, targets: set[str]) -> tuple[str, ...]:
    """The names of head and embedding when they share one weight and either of them has an adapter; else none."""
    head, embedding = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return ()
    modules = {module: name for name, module in base.model.named_modules()}
    names = (f"{modules[embedding]}.weight", f"{modules[head]}.weight")
    return names if targets & set(names) else ()


def _copy_others(folder: Path, out: Path, but: tuple[str, ...] = ()) -> None:
    """Copies what is not weights: config, tokenizer, template, licence."""
    for pattern in _COPIED:
        for file in folder.glob(pattern):
            if file.name not in but and file.is_file():
                copy = out / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


# -- shard by shard ----------------------------------------------------------------------------------------------------


class _Merge(NamedTuple):
    """What is to be done to the stored tensors; `parted` names become weights of their own."""

    targets: dict[str, Target]
    adapter: Adapter
    parted: tuple[str, ...]

    @torch.no_grad()
    def of(self, name: str, stored: Tensor) -> Tensor:
        """The tensor to write under `name`."""
        if name not in self.targets:
            return stored
        target = dataclasses.replace(self.targets[name], holder=_Holder(stored), parameter="stored")
        merged = merged_weight(target, self.adapter).to(stored.dtype).contiguous()
        release((stored,))
        return merged


class _Holder(torch.nn.Module):
    """Lets a target's formula see a stored tensor instead of the live one, which may have another dtype."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.register_buffer("stored", stored)


def _write_shards(folder: Path, out: Path, stored: dict[str, Stored], merge: _Merge) -> None:
    shared = next((name for name in merge.parted if name in stored), None)
    size_bytes = 0
    for shard in sorted({place.shard for place in stored.values()}):
        tensors: dict[str, Tensor] = {}
        with signals_kept(), safe_open(folder / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name not in merge.parted:
                    tensors[name] = merge.of(name, file.get_tensor(name))
                elif name == shared:
                    tensors |= {part: merge.of(part, file.get_tensor(name)) for part in merge.parted}
        save_tensors(tensors, out / shard)
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if shared is not None:
        _describe_parting(out, dict.fromkeys(merge.parted, stored[shared].shard), size_bytes)


def _describe_parting(folder: Path, places: dict[str, str], size_bytes: int) -> None:
    """Says in config and index that head and embedding are two weights now."""
    config = json.loads((folder / _CONFIG).read_text("utf-8"))
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part or part is config:
            part["tie_word_embeddings"] = False
    write_text(folder / _CONFIG, json.dumps(config, indent=2) + "\n")
    index = folder / INDEX
    if index.is_file():
        content = json.loads(index.read_text("utf-8"))
        content["weight_map"] |= places
        content["metadata"] = {**content.get("metadata", {}), "total_size": size_bytes}
        write_text(index, json.dumps(content, indent=2) + "\n")


# -- whole -------------------------------------------------------------------------------------------------------------


def _write_whole(folder: Path, out: Path, adapter: Adapter) -> None:
    """Opens the base once more, in the dtype of most of its numbers, merges, and lets transformers write its layout."""
    model = open_model(folder, _usual_dtype(stored_weights(folder)))
    merge_(model, adapter, keep_originals=False)
    try:
        model.save_pretrained(out)
    except SafetensorError as error:  # it wraps the system's error in a text
        raise OSError(str(error)) from error
