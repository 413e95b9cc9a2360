"""PEFT's adapter folder ⇄ Adapter: strict reading, complete writing, read back after every save.

A folder holds `adapter_config.json` and `adapter_model.safetensors` as PEFT 0.21 writes them, and `deltaw.json` with
the adapter's origin and the sha256 of both, which other tools ignore. Nothing is unpickled, no pattern is run as a
regular expression, and what the format or deltaw cannot express is refused by name instead of being dropped. Keys and
shapes are those of deltaw/adapter/keys.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from deltaw.adapter.keys import Stored, from_keys, to_keys
from deltaw.adapter.spec import LoraSpec
from deltaw.adapter.strict import check_header, read_json
from deltaw.adapter.value import Adapter
from deltaw.disk import new_folder, sha256_file, write_text
from deltaw.errors import AdapterError, DiskError, bullet_list, signals_kept

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "deltaw.json"
MAX_JSON_BYTES = 1 << 20
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ANY_MODULE = r".*\."
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
# Features of PEFT that change the result and that deltaw has no place for, with the values that leave them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "ensure_weight_tying": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "megatron_config": (None,),
}
# Fields that say where an adapter comes from or how it was trained: nothing that happens to it now depends on them.
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("inference_mode", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "megatron_core", "runtime_config"),
}
# Starts that edit the frozen weights: without the edited base the factors alone mean something else.
_EDITING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


# -- writing ----------------------------------------------------------------------------------------------------------


def write_adapter(adapter: Adapter, folder: Path | str) -> Path:
    """Writes the adapter as a PEFT folder, reads it back, compares every tensor, and returns the folder.

    The folder appears complete or not at all, and holds no time, path or host. Raises AdapterError when the adapter is
    empty or not finite or has a combination that the format lacks, DiskError when it cannot be written.
    """
    _refuse_unwritable(adapter)
    with new_folder(Path(folder)) as temporary:
        save_tensors(to_keys(adapter), temporary / WEIGHTS)
        write_text(temporary / CONFIG, json.dumps(_to_config(adapter), indent=2) + "\n")
        digests = {name: sha256_file(temporary / name) for name in (CONFIG, WEIGHTS)}
        manifest = {"format": 1, "origin": dict(sorted(adapter.origin.items())), "sha256": digests}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        _compare(adapter, read_adapter(temporary))
    return Path(folder)


# As the header of a safetensors file names them.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"F8_E8M0": torch.float8_e8m0fnu, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16},
}


def save_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Writes a safetensors file. Raises OSError where the disk fails; the library wraps that in an error of its own."""
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(str(error)) from error


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


def _to_config(adapter: Adapter) -> dict[str, Any]:
    """The config, its patterns in the adapter's order: the first match wins, so order carries meaning."""
    spec = adapter.spec
    stacked = [name for name in adapter.parameter_names if adapter.is_stack(name)]
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
        "target_parameters": stacked or None,
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
    faults = _refused_settings(config)
    manifest = _read_manifest(folder, faults)
    spec = _to_spec(config, faults)
    targeted = _names(config, "target_parameters", faults)
    listed = config.get("target_modules") or []
    modules = [str(name) for name in listed] if isinstance(listed, list) else None
    stored = None if spec is None else from_keys(tensors, spec, targeted, modules, manifest is not None, faults)
    if faults or spec is None or stored is None:
        raise AdapterError(f"The adapter in {folder} cannot be used:\n" + bullet_list(faults))
    return Adapter(
        spec=spec,
        factors=stored.factors,
        modules=_modules(config, stored),
        parameter_names=stored.parameter_names,
        embeddings=stored.embeddings,
        transposed=bool(config.get("fan_in_fan_out")),
        origin=_origin(manifest or {}, config),
        base_copies=stored.copies,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG}.{_hint(folder)}")
    try:
        config = read_json(path, MAX_JSON_BYTES)
    except DiskError:  # a ValueError too, and not the config's fault
        raise
    except ValueError as error:
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
        check_header(path)
        with signals_kept():
            return safetensors.torch.load_file(path)
    except DiskError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error


def _refused_settings(config: dict[str, Any]) -> list[str]:
    faults = []
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        faults.append(f"peft_type is {config['peft_type']!r}; only LORA is read")
    for key, value in config.items():
        if key not in _HARMLESS and value not in _OFF.get(key, (None, False, [], {}, "")):
            known = "is not supported" if key in _OFF else "is unknown"
            faults.append(f"{key} = {value!r} {known}; merge it with the tool that made it, or export without")
    faults += _wrong_types(config)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_EDITING_STARTS):
        faults.append(f"init_lora_weights = {start!r} changes the base; convert it to plain LoRA in PEFT when saving")
    return faults


def _wrong_types(config: dict[str, Any]) -> list[str]:
    """Settings whose type says nothing: the text "false" would count as true."""
    faults = [
        f"{key} must be true or false, not {config[key]!r}"
        for key in ("use_rslora", "use_dora", "fan_in_fan_out")
        if not isinstance(config.get(key), bool | None)
    ]
    listed = config.get("target_modules")
    if (isinstance(listed, list) and all(isinstance(name, str) for name in listed)) or isinstance(listed, str | None):
        return faults
    return [*faults, f"target_modules must be a list of names, not {str(listed)[:60]!r}"]


def _read_manifest(folder: Path, faults: list[str]) -> dict[str, Any] | None:
    """deltaw's own manifest, or None where another tool wrote the folder; damage and changed files become faults."""
    path = folder / MANIFEST
    if not path.is_file():
        if path.exists() or path.is_symlink():
            faults.append(f"{MANIFEST} is no file; delete it to read the folder without")
        return None
    try:
        manifest = read_json(path, MAX_JSON_BYTES)
        digests, origin = dict(manifest["sha256"]), dict(manifest["origin"])
        if manifest.keys() != {"format", "origin", "sha256"} or manifest["format"] != 1:
            raise ValueError("it is not of format 1; a newer deltaw may know it")
        if digests.keys() != {WEIGHTS, CONFIG}:
            raise ValueError("its sha256 are not of the two files of an adapter")
        changed = [name for name in (WEIGHTS, CONFIG) if sha256_file(folder / name) != digests[name]]
    except DiskError:  # a ValueError too, and not the manifest's fault
        raise
    except (ValueError, KeyError, TypeError) as error:
        faults.append(f"{MANIFEST} is damaged ({type(error).__name__}: {error}); delete it to read the folder without")
        return None
    faults += [f"{name} is not the file that was saved (its sha256 differs from {MANIFEST})" for name in changed]
    return {"origin": origin}


def _origin(manifest: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    origin = {str(key): str(value) for key, value in manifest.get("origin", {}).items()}
    for key, field in (("base", "base_model_name_or_path"), ("revision", "revision"), ("task_type", "task_type")):
        if isinstance(config.get(field), str):
            origin.setdefault(key, config[field])
    return origin


def _to_spec(config: dict[str, Any], faults: list[str]) -> LoraSpec | None:
    """The settings, or None and a fault when they have no meaning."""
    patterns: dict[str, Any] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        # As PEFT writes them for what it renamed itself: any module, then a plain name.
        patterns[key] = (
            {str(k).removeprefix(ANY_MODULE): v for k, v in value.items()} if isinstance(value, dict) else {}
        )
        if not isinstance(value, dict):
            faults.append(f"{key} must be an object, not {value!r}")
        odd = [pattern for pattern in patterns[key] if not _PLAIN.fullmatch(pattern)]
        faults += [f"{key} has {p!r}; only plain name suffixes are read, never regular expressions" for p in odd]
    try:
        return LoraSpec(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            targets=("file",),
            dropout=config.get("lora_dropout") or 0.0,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            **patterns,
        )
    except AdapterError as error:
        faults.append(str(error))
        return None


def _names(config: dict[str, Any], key: str, faults: list[str]) -> list[str]:
    """The names in a list of the config; anything else there is a fault."""
    listed = config.get(key) or []
    if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        return listed
    faults.append(f"{key} must be a list of names, not {str(listed)[:60]!r}")
    return []


def _modules(config: dict[str, Any], stored: Stored) -> tuple[str, ...]:
    """The config's plain target_modules where they alone select, else the full names; no regular expression is run."""
    listed = config.get("target_modules")
    narrowed = any(
        config.get(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
    )
    plain = isinstance(listed, list) and all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in listed)
    return tuple(sorted(listed)) if plain and listed and not narrowed else stored.modules
