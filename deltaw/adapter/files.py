"""PEFT's adapter folder ⇄ Adapter: strict reading, complete writing, read back after every save.

A folder holds `adapter_config.json` and `adapter_model.safetensors` as PEFT 0.21 writes them, and `deltaw.json` with the
adapter's origin and the sha256 of both, which other tools ignore. Nothing is unpickled, no pattern is run as a regular
expression, and what the format or deltaw cannot express is refused by name instead of being dropped.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from deltaw.adapter.spec import LoraSpec, first_match, matches
from deltaw.adapter.value import Adapter, Factors
from deltaw.disk import new_folder, sha256_file, write_text
from deltaw.errors import AdapterError, bullet_list

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "deltaw.json"
PREFIX = "base_model.model."
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Features of PEFT that change the result and that deltaw has no place for, with the values that leave them off.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "megatron_config": (None,),
}
# Starts that edit the frozen weights: without the edited base the factors alone mean something else.
_EDITING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


# -- writing ----------------------------------------------------------------------------------------------------------


def write_adapter(adapter: Adapter, folder: Path) -> Path:
    """Writes the adapter as a PEFT folder, reads it back, compares every tensor, and returns the folder.

    The folder appears complete or not at all, and holds no time, path or host. Raises AdapterError when the adapter is
    empty or not finite or has a combination that the format lacks, DiskError when it cannot be written.
    """
    _refuse_unwritable(adapter)
    with new_folder(Path(folder)) as temporary:
        safetensors.torch.save_file(_to_keys(adapter), temporary / WEIGHTS, metadata={"format": "pt"})
        write_text(temporary / CONFIG, json.dumps(_to_config(adapter), indent=2, sort_keys=True) + "\n")
        digests = {name: sha256_file(temporary / name) for name in (CONFIG, WEIGHTS)}
        manifest = {"format": 1, "origin": adapter.origin, "sha256": digests}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        _compare(adapter, read_adapter(temporary))
    return Path(folder)


def _refuse_unwritable(adapter: Adapter) -> None:
    faults = [] if adapter.factors else ["it holds no factors at all"]
    for name, part, tensor in adapter.tensors():
        if not torch.isfinite(tensor).all():
            faults.append(f"{name}: {part} holds NaN or infinite numbers")
        if part == "magnitude" and name in adapter.parameter_names:
            faults.append(f"{name}: PEFT's format has no DoRA for stacked or fused parameters")
    if any("." not in name for name in adapter.parameter_names):
        faults.append("PEFT's format cannot name a parameter that the outermost module holds itself")
    if faults:
        raise AdapterError("This adapter cannot be saved:\n" + bullet_list(faults))


def _to_keys(adapter: Adapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.factors.items():
        owner, A, B = _to_peft_shape(name, factors, adapter)
        embedding = name in adapter.embeddings
        tensors[PREFIX + owner + (".lora_embedding_A" if embedding else ".lora_A.weight")] = A
        tensors[PREFIX + owner + (".lora_embedding_B" if embedding else ".lora_B.weight")] = B
        if factors.magnitude is not None:
            shape = (1, -1, *(1 for _ in A.shape[2:])) if A.ndim > 2 else (-1,)
            tensors[PREFIX + owner + ".lora_magnitude_vector"] = factors.magnitude.reshape(shape)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _to_peft_shape(name: str, factors: Factors, adapter: Adapter) -> tuple[str, Tensor, Tensor]:
    """(key without prefix, A, B): experts are flattened and nested in the order in which their module holds them."""
    if name.endswith(".in_proj_weight"):
        return name.removesuffix(".in_proj_weight"), factors.A, factors.B
    if name in adapter.parameter_names and name.endswith(".out_proj.weight"):
        return name.removesuffix(".out_proj.weight") + ".base_layer.out_proj", factors.A, factors.B
    if name not in adapter.parameter_names:
        return name, factors.A, factors.B
    owner = name.rpartition(".")[0]
    siblings = [other for other in adapter.parameter_names if other.rpartition(".")[0] == owner]
    key = owner + ".base_layer" * (len(siblings) - 1 - siblings.index(name))
    A_flat, B_flat = factors.A.flatten(0, 1), factors.B.permute(1, 2, 0).flatten(1)
    return key, A_flat, B_flat


def _to_config(adapter: Adapter) -> dict[str, Any]:
    spec = adapter.spec
    experts = [name for name in adapter.parameter_names if adapter.factors[name].A.ndim == 3]
    return {
        "peft_type": "LORA",
        "task_type": adapter.origin.get("task_type"),
        "base_model_name_or_path": adapter.origin.get("base"),
        "revision": adapter.origin.get("revision"),
        "r": spec.rank,
        "lora_alpha": _as_integer(spec.alpha),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: _as_integer(alpha) for key, alpha in spec.alpha_pattern.items()},
        "target_modules": list(adapter.modules),
        "target_parameters": _short_parameters(experts) or None,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "fan_in_fan_out": adapter.transposed,
        "bias": "none",
        "lora_bias": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def _as_integer(number: float) -> float | int:
    """Readers such as Ollama want an integer alpha; keep 32.0 as 32."""
    return int(number) if float(number).is_integer() else number


def _short_parameters(names: list[str]) -> list[str]:
    """Suffixes behind the block number ("mlp.experts.down_proj") when every block has them, full names otherwise."""
    by_suffix: dict[str, int] = defaultdict(int)
    for name in names:
        by_suffix[re.split(r"\.\d+\.", name)[-1]] += 1
    same = len(set(by_suffix.values())) == 1 and all(re.search(r"\.\d+\.", name) for name in names)
    return list(by_suffix) if same else list(names)


def _compare(written: Adapter, read: Adapter) -> None:
    """Every save is read back: same names, shapes and bits, or it does not count."""
    stored = {(name, part): tensor for name, part, tensor in read.tensors()}
    wanted = {(name, part): tensor for name, part, tensor in written.tensors()}
    different = [
        f"{name}: {part}"
        for name, part in wanted.keys() | stored.keys()
        if (name, part) not in wanted
        or (name, part) not in stored
        or not torch.equal(wanted[name, part].detach().cpu(), stored[name, part])
    ]
    if different:
        raise AdapterError("The saved adapter does not read back as it was:\n" + bullet_list(sorted(different)))


# -- reading ----------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path | str) -> Adapter:
    """The adapter in a PEFT folder, exactly as stored.

    Raises AdapterError, with every fault of the folder listed, when a file is missing or unreadable, a setting or key
    is unknown or unsupported, a pair is incomplete, a shape contradicts the config, or a number is not finite.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    faults = _refused_settings(config) + _manifest_faults(folder)
    factors, parameter_names, embeddings, copies = _from_keys(tensors, config, faults)
    spec = _to_spec(config, faults)
    if spec is not None:
        faults += [
            fault
            for name, value in factors.items()
            for fault in _shape_faults(name, value, spec, name in parameter_names)
        ]
    if faults or spec is None:
        raise AdapterError(f"The adapter in {folder} cannot be used:\n" + bullet_list(faults))
    return Adapter(
        spec=spec,
        factors=factors,
        modules=_modules(config, factors, parameter_names),
        parameter_names=parameter_names,
        embeddings=embeddings,
        transposed=bool(config.get("fan_in_fan_out")),
        origin=_origin(folder, config),
        base_copies=copies,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG}.{_hint(folder)}")
    if path.stat().st_size > 1 << 20:
        raise AdapterError(f"{path} has {path.stat().st_size:,} bytes; an adapter config has a few thousand.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, not {type(config).__name__}.")
    return config


def _hint(folder: Path) -> str:
    if (folder / "adapter" / CONFIG).is_file():
        return f" It looks like a run folder; use {folder / 'adapter'}."
    return "" if folder.exists() else " The folder does not exist."


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        why = (
            f" It has {', '.join(pickles)}, which can run code when read; save it again as safetensors."
            if pickles
            else ""
        )
        raise AdapterError(f"{folder} has no {WEIGHTS}.{why}")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error


def _refused_settings(config: dict[str, Any]) -> list[str]:
    faults = []
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        faults.append(f"peft_type is {config['peft_type']!r}; only LORA is read")
    for key, off in _REFUSED.items():
        if config.get(key) not in off:
            faults.append(
                f"{key} = {config[key]!r} is not supported; merge it with the tool that made it, or export without"
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_EDITING_STARTS):
        faults.append(f"init_lora_weights = {start!r} changes the base; convert it to plain LoRA in PEFT when saving")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            if not _PLAIN.fullmatch(pattern):
                faults.append(f"{key} has {pattern!r}; only plain name suffixes are read, never regular expressions")
    return faults


def _manifest_faults(folder: Path) -> list[str]:
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        digests = json.loads(path.read_text("utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} is damaged: {error}"]
    changed = [
        name for name, digest in digests.items() if name in (WEIGHTS, CONFIG) and sha256_file(folder / name) != digest
    ]
    return [f"{name} is not the file that was saved (its sha256 differs from {MANIFEST})" for name in changed]


def _origin(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    path = folder / MANIFEST
    origin = dict(json.loads(path.read_text("utf-8")).get("origin", {})) if path.is_file() else {}
    for key, field in (("base", "base_model_name_or_path"), ("revision", "revision"), ("task_type", "task_type")):
        if isinstance(config.get(field), str):
            origin.setdefault(key, config[field])
    return origin


def _to_spec(config: dict[str, Any], faults: list[str]) -> LoraSpec | None:
    try:
        return LoraSpec(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            targets=("file",),
            dropout=config.get("lora_dropout") or 0.0,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
        )
    except (AdapterError, TypeError) as error:
        faults.append(f"its settings have no meaning: {error}")
        return None


def _split_key(key: str) -> tuple[str, str] | None:
    """("model.layers.0.mlp.up_proj", "A") of a stored key, or None for a key that no rule knows."""
    if not key.startswith(PREFIX) or "_orig_mod" in key:
        return None
    for suffix, part in _PARTS.items():
        if key.endswith(suffix):
            return key[len(PREFIX) : -len(suffix)], part
    if key.endswith(".base_layer.weight"):
        return key[len(PREFIX) : -len(".base_layer.weight")], "copy"
    return None


def _from_keys(
    tensors: dict[str, Tensor], config: dict[str, Any], faults: list[str]
) -> tuple[dict[str, Factors], tuple[str, ...], tuple[str, ...], dict[str, Tensor]]:
    """(factors by name, names of parameters, names of embeddings, frozen copies); faults are appended."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    copies: dict[str, Tensor] = {}
    embeddings = dict.fromkeys(k[len(PREFIX) :].rpartition(".")[0] for k in tensors if k.endswith(".lora_embedding_A"))
    for key, tensor in tensors.items():
        split = _split_key(key)
        if split is None:
            faults.append(f"unknown key {key!r}")
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            faults.append(f"{key}: stored as {tensor.dtype}, not as a floating-point number")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{key}: holds NaN or infinite numbers")
        elif split[1] == "copy":
            copies[split[0]] = tensor
        else:
            found[split[0]][split[1]] = tensor
    if not found and not faults:
        faults.append("the file holds no factors: it would leave the base as it is")
    complete = {owner: parts for owner, parts in found.items() if _complete(owner, parts, config, faults)}
    factors, parameters = _named(complete, config, faults)
    return factors, parameters, tuple(embeddings), copies


def _complete(owner: str, parts: dict[str, Tensor], config: dict[str, Any], faults: list[str]) -> bool:
    needed = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    missing, extra = needed - parts.keys(), parts.keys() - needed
    faults += [f"{owner}: {part} is missing" for part in sorted(missing)]
    faults += [f"{owner}: {part} is stored although use_dora is false" for part in sorted(extra)]
    if "A" in parts and "B" in parts and (parts["A"].ndim < 2 or parts["A"].ndim != parts["B"].ndim):
        faults.append(f"{owner}: A {list(parts['A'].shape)} and B {list(parts['B'].shape)} are no pair of factors")
        return False
    return not missing


def _named(
    found: dict[str, dict[str, Tensor]], config: dict[str, Any], faults: list[str]
) -> tuple[dict[str, Factors], tuple[str, ...]]:
    """Names as a live model has them: nested ".base_layer" keys become parameter names."""
    targeted = [name for name in config.get("target_parameters") or [] if isinstance(name, str)]
    attention = {o.removesuffix(".base_layer.out_proj") for o in found if o.endswith(".base_layer.out_proj")}
    names: dict[str, str] = {}
    for owner in found:
        if owner in attention:
            names[owner] = owner + ".in_proj_weight"
        elif owner.endswith(".base_layer.out_proj"):
            names[owner] = owner.removesuffix(".base_layer.out_proj") + ".out_proj.weight"
        else:
            names[owner] = _expert_name(owner, found, targeted) or owner
    parameters = tuple(name for owner, name in names.items() if name != owner)
    factors = {}
    for owner, name in names.items():
        parts = dict(found[owner])
        if name != owner and owner not in attention and not owner.endswith(".base_layer.out_proj"):
            parts = _stacked(owner, parts, config, faults, name)
        if "magnitude" in parts:
            parts["magnitude"] = parts["magnitude"].flatten()
        factors[name] = Factors(**parts)
    return factors, _in_holding_order(parameters)


def _expert_name(owner: str, found: dict[str, dict[str, Tensor]], targeted: list[str]) -> str | None:
    """ "….experts.base_layer" → "….experts.gate_up_proj": the innermost is the first parameter that the module holds."""
    module = re.sub(r"(\.base_layer)+$", "", owner)
    depth = (len(owner) - len(module)) // len(".base_layer")
    mine = [name.rpartition(".")[2] for name in targeted if matches(module, name.rpartition(".")[0])]
    nested = [other for other in found if re.sub(r"(\.base_layer)+$", "", other) == module]
    if not mine or len(mine) != len(nested):
        return None
    return f"{module}.{_in_holding_order(tuple(mine))[len(mine) - 1 - depth]}"


def _in_holding_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """PEFT stores target_parameters as a set; experts hold "down" last. A wrong guess fails the shape check at injection."""
    return tuple(sorted(names, key=lambda name: (name.rpartition(".")[0], "down" in name.rpartition(".")[2])))


def _stacked(
    owner: str, parts: dict[str, Tensor], config: dict[str, Any], faults: list[str], name: str
) -> dict[str, Tensor]:
    pattern = first_match(name, config.get("rank_pattern") or {})
    rank = (config.get("rank_pattern") or {}).get(pattern, config.get("r", 8))
    A, B = parts["A"], parts["B"]
    if not isinstance(rank, int) or rank < 1 or A.shape[0] % rank or A.shape[0] != B.shape[-1]:
        faults.append(f"{owner}: A {list(A.shape)} and B {list(B.shape)} are no stack of rank-{rank} factors")
        return parts
    experts = A.shape[0] // rank
    A_ERI = A.reshape(experts, rank, A.shape[1])
    B_EOR = B.reshape(B.shape[0], rank, experts).permute(2, 0, 1)
    return {**parts, "A": A_ERI.contiguous(), "B": B_EOR.contiguous()}


def _modules(config: dict[str, Any], factors: dict[str, Factors], parameter_names: tuple[str, ...]) -> tuple[str, ...]:
    """The config's plain target_modules if it has them, else the full names in the file; a regular expression is not run."""
    stored = config.get("target_modules")
    if isinstance(stored, list) and all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in stored):
        return tuple(sorted(stored))
    return tuple(sorted(name for name in factors if name not in parameter_names))


def _shape_faults(name: str, factors: Factors, spec: LoraSpec, stacked: bool) -> list[str]:
    rank = spec.rank_of(name.removesuffix(".in_proj_weight").removesuffix(".out_proj.weight"))
    first = 1 if stacked and factors.A.ndim == 3 else 0
    if factors.A.shape[first] == rank == factors.B.shape[first + 1]:
        return []
    return [
        f"{name}: A {list(factors.A.shape)} and B {list(factors.B.shape)} do not have the rank {rank} of the config"
    ]
