"""Names and shapes in PEFT's file ⇄ names and shapes in a model. No file is touched here.

Three rules cover every key, and each is used in both directions:
  a layer that is called      owner = its name;
  attention (one module with two projections)   owner = the module for `in_proj_weight`, and the module +
                              ".base_layer.out_proj" for its output projection;
  stacked experts             owner = the module, ".base_layer" once for each parameter that the module holds after this
                              one; the stack of factors is flattened to two dimensions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.adapter.spec import LoraSpec, matches
from deltaw.adapter.value import Adapter, Factors

PREFIX = "base_model.model."
IN_PROJ, OUT_PROJ, NESTED_OUT_PROJ = ".in_proj_weight", ".out_proj.weight", ".base_layer.out_proj"
# PEFT up to 0.21 adds the output projection's ΔW of nn.MultiheadAttention twice, in forward and in merge
# (huggingface/peft#3774). A file means what its readers compute, so B is halved in the file, which is exact.
# test_peft_still_adds_the_output_projection_twice says when this becomes 1.
OUT_PROJ_TIMES = 2
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.weight": "copy",
    ".base_layer.bias": "copy of a bias",
}
BIAS = ".bias"  # behind the name of a layer, of whose bias a file holds a copy
# What a module can be called; longer or other names are of no model, and are not passed on to anything.
_NAME, MAX_NAME = re.compile(r"[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)*"), 512
MAX_PAIRINGS = 4_000_000  # each name of target_parameters is compared with each owner of factors
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# -- Adapter → keys ---------------------------------------------------------------------------------------------------


def to_keys(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor of the adapter under its key and in its shape in PEFT's file."""
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.factors.items():
        owner, A, B = _to_owner(name, factors, adapter)
        embedding = name in adapter.embeddings
        tensors[PREFIX + owner + (".lora_embedding_A" if embedding else ".lora_A.weight")] = A
        tensors[PREFIX + owner + (".lora_embedding_B" if embedding else ".lora_B.weight")] = B
        if factors.magnitude is not None:
            shape = (1, -1, *(1 for _ in A.shape[2:])) if A.ndim > 2 else (-1,)
            tensors[PREFIX + owner + ".lora_magnitude_vector"] = factors.magnitude.reshape(shape)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _to_owner(name: str, factors: Factors, adapter: Adapter) -> tuple[str, Tensor, Tensor]:
    """(owner, A, B) as the file has them."""
    if name not in adapter.parameter_names:
        return name, factors.A, factors.B
    if factors.A.ndim == 2:
        if name.endswith(OUT_PROJ):
            return name.removesuffix(OUT_PROJ) + NESTED_OUT_PROJ, factors.A, factors.B / OUT_PROJ_TIMES
        return name.removesuffix(IN_PROJ), factors.A, factors.B
    module = name.rpartition(".")[0]
    siblings = [other for other in adapter.parameter_names if other.rpartition(".")[0] == module]
    owner = module + ".base_layer" * (len(siblings) - 1 - siblings.index(name))
    return owner, factors.A.flatten(0, 1), factors.B.permute(1, 2, 0).flatten(1)


# -- keys → Adapter ---------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What a file holds: factors by name, names of parameters in holding order, of embeddings, of modules, copies."""

    factors: dict[str, Factors]
    parameter_names: tuple[str, ...]
    embeddings: tuple[str, ...]
    modules: tuple[str, ...]
    copies: dict[str, Tensor]


def from_keys(
    tensors: dict[str, Tensor],
    spec: LoraSpec,
    targeted: Sequence[str],
    modules: Sequence[str] | None,
    in_order: bool,
    faults: list[str],
) -> Stored:
    """The content of a file with these tensors; what is wrong with it is appended to `faults`.

    `targeted` is the config's target_parameters, in the order in which the model holds them if `in_order`. `modules` is
    its target_modules, None where they are a regular expression.
    """
    found, copies = _split(tensors, faults)
    if not found and not faults:
        faults.append("the file holds no factors: it would leave the base as it is")
    pairs = {owner: parts for owner, parts in found.items() if _is_complete(owner, parts, spec, faults)}
    names = _names(pairs, targeted, modules, in_order, faults)
    factors = {names[owner]: _factors(owner, names[owner], parts, spec, faults) for owner, parts in pairs.items()}
    faults += _mixed_halves(tensors)
    embeddings = [key[len(PREFIX) :].removesuffix(".lora_embedding_A") for key in tensors if "lora_embedding_A" in key]
    parameters = _in_holding_order([name for owner, name in names.items() if name != owner], targeted, in_order)
    adapted = {_module(owner) for owner in names if names[owner] == owner or _is_attention(names[owner])}
    return Stored(factors, tuple(parameters), tuple(embeddings), tuple(sorted(adapted)), copies)


def _mixed_halves(tensors: dict[str, Tensor]) -> list[str]:
    """An embedding's A beside a layer's B, or the reverse: no program writes that."""
    owners = [
        {key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)}
        for end in (".lora_embedding_A", ".lora_embedding_B", ".lora_A.weight", ".lora_B.weight")
    ]
    mixed = (owners[0] & owners[3]) | (owners[1] & owners[2])
    return [f"{owner[:MAX_NAME]}: one half is an embedding's, the other a layer's" for owner in sorted(mixed)]


def _split(tensors: dict[str, Tensor], faults: list[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """({owner: {part: tensor}}, {module: copy of its frozen weight}) of the keys and tensors that are in order."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
        if "_orig_mod" in key:
            faults.append(
                f"key {key[:MAX_NAME]!r} was saved from a compiled model; save it from the model before torch.compile"
            )
        elif not key.startswith(PREFIX):
            faults.append(f"key {key[:MAX_NAME]!r} does not start with {PREFIX!r}")
        elif suffix is None:
            faults.append(f"key {key[:MAX_NAME]!r} is unknown")
        elif len(key) > MAX_NAME or not _NAME.fullmatch(key[len(PREFIX) : -len(suffix)]):
            faults.append(f"key {key[:MAX_NAME]!r} names no module")
        elif tensor.dtype not in _FLOATS:
            faults.append(f"{key}: stored as {str(tensor.dtype).removeprefix('torch.')}, not as floating-point numbers")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{key}: holds NaN or infinite numbers")
        elif suffix.startswith(".base_layer"):
            copies[key[len(PREFIX) : -len(suffix)] + (BIAS if suffix.endswith(BIAS) else "")] = tensor
        else:
            found[key[len(PREFIX) : -len(suffix)]][_PARTS[suffix]] = tensor
    return found, copies


def _is_complete(owner: str, parts: dict[str, Tensor], spec: LoraSpec, faults: list[str]) -> bool:
    needed = {"A", "B", "magnitude"} if spec.dora else {"A", "B"}
    missing, extra = needed - parts.keys(), parts.keys() - needed
    faults += [f"{owner}: {part} is missing" for part in sorted(missing)]
    faults += [f"{owner}: {part} is stored although use_dora is false" for part in sorted(extra)]
    if "A" in parts and "B" in parts and (parts["A"].ndim < 2 or parts["A"].ndim != parts["B"].ndim):
        faults.append(f"{owner}: A {list(parts['A'].shape)} and B {list(parts['B'].shape)} are no pair of factors")
        return False
    return not missing


def _names(
    pairs: dict[str, dict[str, Tensor]],
    targeted: Sequence[str],
    modules: Sequence[str] | None,
    in_order: bool,
    faults: list[str],
) -> dict[str, str]:
    """{owner in the file: name in a live model}."""
    names = {owner: owner for owner in pairs}
    for owner in pairs:
        if owner.endswith(NESTED_OUT_PROJ):
            names[owner] = _module(owner) + OUT_PROJ
            if _module(owner) in names:
                names[_module(owner)] = _module(owner) + IN_PROJ
    if len(targeted) * len(pairs) > MAX_PAIRINGS:
        faults.append(f"target_parameters has {len(targeted):,} names for {len(pairs):,} pairs of factors: too many")
        return names
    layers = set(modules or ())
    owners: dict[str, list[str]] = defaultdict(list)
    for owner in pairs:
        if names[owner] == owner:
            owners[_module(owner)].append(owner)
    for module, held in owners.items():
        # A bare name is of every module that has such a parameter, but of none that is adapted as a layer.
        stacked = any(owner != module for owner in held) if modules is None else layers.isdisjoint(_ends(module))
        mine = [f"{module}.{t.rpartition('.')[2]}" for t in targeted if _holds(module, t, stacked)]
        nested = sorted(held, key=len, reverse=True)
        if mine and nested:
            names |= dict(zip(nested, _in_holding_order(mine, targeted, in_order), strict=False))
            faults += _ambiguous(module, mine, [pairs[owner] for owner in nested], in_order)
        elif any(owner != module for owner in nested):
            faults.append(f"{module}: has nested factors, but target_parameters names none of its parameters")
    return names


def _module(owner: str) -> str:
    """The module of an owner: "a.experts.base_layer" → "a.experts", "attn.base_layer.out_proj" → "attn"."""
    return re.sub(r"(\.base_layer)+$", "", owner.removesuffix(".out_proj") if NESTED_OUT_PROJ in owner else owner)


def _ends(name: str) -> list[str]:
    """The name and every shorter one that it ends with at a dot."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _holds(module: str, targeted: str, stacked: bool) -> bool:
    """Whether PEFT's target_parameters entry names a parameter of this module, which may be one that holds a stack."""
    path, _, parameter = targeted.rpartition(".")
    return bool(parameter) and (matches(module, path) if path else stacked)


def _ambiguous(module: str, mine: list[str], nested: list[dict[str, Tensor]], in_order: bool) -> list[str]:
    """A wrong order shows in the shapes; where it could not, the file does not say which factors are whose."""
    if len(mine) != len(nested):
        return [f"{module}: target_parameters names {len(mine)} of its parameters, the file holds {len(nested)}"]
    shapes = [(parts["A"].shape, parts["B"].shape) for parts in nested]
    if in_order or len(set(shapes)) == len(shapes):
        return []
    short = ", ".join(name.rpartition(".")[2] for name in mine)
    return [f"{module}: {short} have one shape, and the file does not say which factors belong to which"]


def _in_holding_order(names: list[str], targeted: Sequence[str], in_order: bool) -> list[str]:
    """Names module by module, as the model holds them: as in `targeted`, or with the down projection last.

    PEFT does not store the order. A wrong guess fails the check of shapes when the adapter is injected.
    """
    if in_order:
        order = {entry: place for place, entry in enumerate(targeted)}
        return sorted(names, key=lambda name: order.get(name, -1))
    return sorted(names, key=lambda name: (name.rpartition(".")[0], "down" in name.rpartition(".")[2]))


def _is_attention(name: str) -> bool:
    return name.endswith((IN_PROJ, OUT_PROJ))


def _factors(owner: str, name: str, parts: dict[str, Tensor], spec: LoraSpec, faults: list[str]) -> Factors:
    """The factors in the shapes of a live model."""
    A, B, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    rank = spec.rank_of(_module(owner) if _is_attention(name) else name)
    if owner.endswith(NESTED_OUT_PROJ):
        B = B * OUT_PROJ_TIMES
    stacked = name != owner and not _is_attention(name)
    fits = A.shape[0] % rank == 0 and A.shape[0] == B.shape[-1] if stacked else A.shape[0] == B.shape[1] == rank
    if not fits:
        shapes = f"A {list(A.shape)} and B {list(B.shape)}"
        faults.append(f"{owner}: {shapes} do not have the rank {rank} of the config")
    elif stacked:
        A, B = _unflatten(A, B, rank)
    return Factors(A, B, None if magnitude is None else magnitude.flatten())


def _unflatten(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    experts = len(A) // rank
    A_ERI = A.reshape(experts, rank, A.shape[1])
    B_EOR = B.reshape(len(B), rank, experts).permute(2, 0, 1)
    return A_ERI.contiguous(), B_EOR.contiguous()
