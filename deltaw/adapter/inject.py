"""Choose targets, list them, apply adapters to a live model, and take them off again exactly.

`choose` only looks. `inject` checks everything, lists all faults at once, and only then touches the model: it freezes
the parameters and hangs hooks on the adapted layers (deltaw/adapter/layer.py). `Injection.eject` undoes just that.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaw.adapter.keys import BIAS
from deltaw.adapter.layer import CONVOLUTIONS, AdaptedLayer, Live, Target, attach, keep_rows_padded, shape_of
from deltaw.adapter.spec import ALL_LINEAR, LoraSpec, first_match, matches
from deltaw.adapter.value import Adapter, Factors
from deltaw.adapter.weight import dense_weight, weight_shape
from deltaw.errors import AdapterError, bullet_list

_MARK = "_deltaw_injection"
_BLOCK_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


# -- what can be adapted ----------------------------------------------------------------------------------------------


Candidate = tuple[str, str, nn.Module, nn.Module, str]


def _candidates(model: nn.Module) -> Iterator[Candidate]:
    """(name, kind, owner, holder, parameter) of every weight that deltaw can adapt, in the model's order."""
    skip: set[nn.Module] = {model}  # no adapter format can name the outermost module
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            skip.add(module.out_proj)
        if module not in skip:
            yield from _module_candidates(name, module)
        if not isinstance(module, _LAYERS) and not _is_conv1d(module):
            yield from _stacked_candidates(name, module)


_LAYERS = (nn.MultiheadAttention, nn.Linear, nn.Embedding, *CONVOLUTIONS)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores [in, out]; known by name, since transformers is not imported."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor)


def _module_candidates(name: str, module: nn.Module) -> Iterator[Candidate]:
    if isinstance(module, nn.MultiheadAttention):
        if isinstance(module.in_proj_weight, Tensor):  # None where query, key and value have other widths
            yield f"{name}.in_proj_weight", "parameter_attention", module, module, "in_proj_weight"
            yield f"{name}.out_proj.weight", "parameter_attention", module, module.out_proj, "weight"
    elif isinstance(module, nn.Linear):
        yield name, "linear", module, module, "weight"
    elif _is_conv1d(module):
        yield name, "transposed", module, module, "weight"
    elif isinstance(module, tuple(CONVOLUTIONS)):
        yield name, "conv", module, module, "weight"
    elif isinstance(module, nn.Embedding):
        yield name, "embedding", module, module, "weight"


def _stacked_candidates(name: str, module: nn.Module) -> Iterator[Candidate]:
    """3-D parameters held directly by a module that is no known layer: stacked experts, or whatever the user names."""
    kind = "parameter_transposed" if getattr(module, "is_transposed", False) else "parameter"
    for parameter, value in module.named_parameters(recurse=False):
        if value.ndim == 3:
            yield (f"{name}.{parameter}" if name else parameter), kind, module, module, parameter


def _module_of(candidate: Candidate) -> str:
    """The name by which PEFT's target_modules would select this candidate: attention is selected whole."""
    name, kind = candidate[:2]
    if kind == "parameter_attention":
        return name.removesuffix(".in_proj_weight").removesuffix(".out_proj.weight")
    return name


# In models of these types PEFT refuses layers of these names (its issue is Mamba's fused kernel, which reads them past
# the layer), or takes the names for those of stacked experts, as these models had them before transformers 5.
_MAMBAS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_ONCE_UNSTACKED = frozenset({
    *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
    *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
    *("qwen3_omni_moe_thinker", "solar_open"),
})  # fmt: skip
_NOT_READ = {
    **dict.fromkeys(_MAMBAS, ({"out_proj", "conv1d"}, "PEFT refuses this layer in a model with Mamba blocks")),
    **dict.fromkeys(
        _ONCE_UNSTACKED,
        ({"gate", "gate_proj", "up_proj", "down_proj"}, "PEFT takes this name for that of the stacked experts here"),
    ),
}


def _unread(model: nn.Module, candidate: Candidate) -> str | None:
    """Why PEFT, and so every reader of its format, would not find this layer's factors in this model; usually None."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    names, reason = _NOT_READ.get(model_type, (set(), ""))
    is_named = candidate[1] not in ("parameter", "parameter_transposed")
    return reason if is_named and _module_of(candidate).rpartition(".")[2] in names else None


def _wanted(candidate: Candidate, spec: LoraSpec, model: nn.Module, head: nn.Module | None) -> bool:
    names = (_module_of(candidate), candidate[0])
    if spec.layers is not None and _block_number(candidate[0]) not in spec.layers:
        return False
    if any(first_match(name, spec.exclude) for name in names):
        return False
    if any(first_match(name, spec.targets) for name in names):
        return True
    usual = _is_linear(candidate) and candidate[2] is not head and _unread(model, candidate) is None
    return ALL_LINEAR in spec.targets and usual


def _block_number(name: str) -> int | None:
    number = _BLOCK_NUMBER.search(name)
    return None if number is None else int(number[1])


def _is_linear(candidate: Candidate) -> bool:
    """Linear layers, attention projections, and stacks with one matrix for each of the module's `num_experts`.

    Other 3-D parameters (position embeddings, class tokens) are no stacks of linear layers and must be named.
    """
    _, kind, owner, holder, parameter = candidate
    if kind in ("parameter", "parameter_transposed"):
        return getattr(owner, "num_experts", None) == shape_of(holder, parameter)[0]
    return kind in ("linear", "transposed", "parameter_attention")


def _output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, which "all-linear" leaves out; None where the model does not say."""
    getter: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def choose(model: nn.Module, spec: LoraSpec) -> list[Target]:
    """What `inject` will adapt in `model`: name, shape, rank, alpha and parameter count of each, in the model's order.

    "all-linear" means every Linear and Conv1D layer, attention projection and stacked expert, but not the output head,
    nor what PEFT could not read in a model of this type.
    Raises AdapterError, before anything is changed, when a target or exclusion matches nothing (with the nearest names)
    or cannot be adapted in the way asked for.
    """
    candidates, head = list(_candidates(model)), _output_head(model)
    chosen = [c for c in candidates if _wanted(c, spec, model, head)]
    faults = _unmatched(spec, candidates, chosen) + _half_attention(chosen)
    faults += [fault for c in chosen for fault in _unsuitable(c, spec)]
    faults += [f"{c[0]}: {reason}; leave it out" for c in chosen if (reason := _unread(model, c))]
    if not faults and not chosen:
        wishes = f"targets {list(spec.targets)}, exclude {list(spec.exclude)}, layers {spec.layers}"
        faults = [f"no layer is left to adapt: {wishes}"]
    if faults:
        raise AdapterError("These targets cannot be adapted:\n" + bullet_list(faults))
    selection = _selection(model, chosen)
    return [_target(c, spec, selection) for c in chosen]


def _target(candidate: Candidate, spec: LoraSpec, selection: tuple[str, ...]) -> Target:
    name, kind, owner, holder, parameter = candidate
    key = _module_of(candidate)
    return Target(
        name=name,
        kind=kind,
        owner=owner,
        holder=holder,
        parameter=parameter,
        shape=shape_of(holder, parameter),
        rank=spec.rank_of(key),
        alpha=spec.alpha_of(key),
        scale=spec.scale_of(key),
        dora=spec.dora,
        selection=selection,
    )


def _unmatched(spec: LoraSpec, candidates: list[Candidate], chosen: list[Candidate]) -> list[str]:
    """Every target, exclusion, block number and pattern that changes nothing: most likely a slip of the pen."""
    names, chosen_names = _all_names(candidates), _all_names(chosen)
    wanted = [(pattern, names) for pattern in (*spec.targets, *spec.exclude) if pattern != ALL_LINEAR]
    if chosen:
        wanted += [(pattern, chosen_names) for pattern in (*spec.rank_pattern, *spec.alpha_pattern)]
    faults = [
        f"{pattern!r} matches nothing{'' if among is names else ' that is adapted'}; {_nearest(pattern, among)}"
        for pattern, among in wanted
        if not any(matches(name, pattern) for name in among)
    ]
    blocks = {_block_number(c[0]) for c in candidates}
    missing = [number for number in spec.layers or () if number not in blocks]
    return list(dict.fromkeys(faults)) + [f"the model has no layer number {number}" for number in missing]


def _all_names(candidates: list[Candidate]) -> list[str]:
    return list(dict.fromkeys(name for c in candidates for name in (c[0], _module_of(c))))


def _half_attention(chosen: list[Candidate]) -> list[str]:
    count = Counter(_module_of(c) for c in chosen if c[1] == "parameter_attention")
    return [f"{name}: its two projections are adapted together or not at all" for name, n in count.items() if n == 1]


def _nearest(pattern: str, names: list[str]) -> str:
    depth = pattern.count(".") + 1
    suffixes = list(dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names))
    near = difflib.get_close_matches(pattern, suffixes, n=3, cutoff=0.4) or suffixes[:6]
    return "the nearest names are " + ", ".join(repr(name) for name in near) if near else "the model has no such layers"


def _unsuitable(candidate: Candidate, spec: LoraSpec) -> list[str]:
    """What PEFT's file format, and so every reader of it, has no meaning for."""
    name, kind, _, layer, _ = candidate
    faults = []
    if kind == "conv":
        odd = [f"{key}={getattr(layer, key)}" for key, usual in _USUAL_CONVOLUTION if not usual(getattr(layer, key))]
        if odd:
            faults.append(f"{name}: a convolution with {', '.join(odd)} has no place in the adapter format; exclude it")
    if kind.startswith("parameter") and spec.dora:
        faults.append(f"{name}: DoRA is not defined for stacked or fused parameters; exclude it or turn DoRA off")
    if kind.startswith("parameter") and spec.dropout:
        faults.append(f"{name}: dropout cannot act on stacked or fused parameters; exclude it or set dropout 0")
    if kind == "embedding" and spec.dropout:
        faults.append(f"{name}: dropout has no meaning for token ids; set dropout 0")
    if kind == "embedding" and getattr(layer, "max_norm", None) is not None:
        faults.append(f"{name}: an embedding with max_norm rewrites its weight in each forward; exclude it")
    return faults


_USUAL_CONVOLUTION: list[tuple[str, Callable[[Any], bool]]] = [
    ("groups", lambda value: value == 1),
    ("dilation", lambda value: all(step == 1 for step in value)),
    ("padding_mode", lambda value: value == "zeros"),
]


def _selection(model: nn.Module, chosen: list[Candidate]) -> tuple[str, ...]:
    """Plain suffixes that select exactly the chosen modules in this model, as PEFT reads target_modules.

    Short ones ("q_proj") where they are unambiguous; full names otherwise.
    """
    names = {_module_of(c) for c in chosen if c[1] not in ("parameter", "parameter_transposed")}
    everything = [name for name, _ in model.named_modules()]
    suffixes = dict.fromkeys(name.rsplit(".", 1)[-1] for name in sorted(names))
    short = tuple(sorted(suffixes))
    if {name for name in everything if first_match(name, short)} == names:
        return short
    return tuple(sorted(names))


# -- applying ---------------------------------------------------------------------------------------------------------


class Injection:
    """Adapters at work in a model. `active` chooses one of them (None: the plain base); `strength` scales its part.

    Used as a context manager it ejects at the end. The model's parameters are frozen while it lasts.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], layers: list[dict[str, AdaptedLayer]]) -> None:
        self.model, self.adapters, self.layers = model, list(adapters), layers
        self.active: int | None = 0
        self.strength = 1.0
        self._handles: list[RemovableHandle] = []
        self._required_grad: dict[str, bool] = {}

    @property
    def targets(self) -> list[Target]:
        """What the first adapter adapts."""
        return [layer.target for layer in self.layers[0].values()]

    @property
    def hook_ids(self) -> set[int]:
        """The hooks that are this injection's own, by torch's numbers for them."""
        return {handle.id for handle in self._handles}

    def train(self, mode: bool = True) -> None:
        """Switches the adapters' dropout on or off."""
        for layers in self.layers:
            for layer in layers.values():
                layer.training = mode

    def trained(self, index: int = 0) -> Iterator[tuple[str, str, Tensor]]:
        """(name, "A" | "B" | "magnitude", live tensor) of adapter `index`."""
        for name, layer in self.layers[index].items():
            for part, tensor in layer.tensors():
                yield name, part, tensor

    def extract(self, index: int = 0) -> Adapter:
        """Adapter `index` as a value: copies of the live tensors in fp32."""
        source = self.adapters[index]
        factors = {
            name: Factors(**{part: tensor.detach().float().clone() for part, tensor in layer.tensors()})
            for name, layer in self.layers[index].items()
        }
        return source.with_factors(factors)

    def eject(self) -> None:
        """Takes every hook off and restores `requires_grad`; the model is then exactly what it was."""
        if self.model.__dict__.get(_MARK) is not self:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        self.model.__dict__.pop(_MARK, None)

    def reapply(self) -> None:
        """Puts ejected hooks back, with the same live factors."""
        refuse_injected(self.model)
        self._apply()

    def __enter__(self) -> Injection:
        return self

    def __exit__(self, *_: object) -> None:
        self.eject()

    def _apply(self) -> None:
        self._required_grad = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.model.requires_grad_(False)
        owners = {id(layer.target.owner): layer.target.owner for layers in self.layers for layer in layers.values()}
        for key, owner in owners.items():
            per_adapter = [
                [layer for layer in layers.values() if id(layer.target.owner) == key] for layers in self.layers
            ]
            self._handles += attach(owner, self._live(per_adapter))
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(part in owners.values() for part in module.modules()):
                self._handles += keep_rows_padded(module)
        self.model.__dict__[_MARK] = self

    def _live(self, per_adapter: list[list[AdaptedLayer]]) -> Live:
        return lambda: ([] if self.active is None or self.strength == 0 else per_adapter[self.active], self.strength)


def injection_of(model: nn.Module) -> Injection | None:
    """The injection at work in the model, if there is one."""
    found: Injection | None = model.__dict__.get(_MARK)
    return found


def refuse_injected(model: nn.Module) -> None:
    """Raises AdapterError while adapters are at work in the model."""
    if _MARK in model.__dict__:
        raise AdapterError("This model has adapters already; call .eject() on its Injection first.")


def inject(
    model: nn.Module, *adapters: Adapter, dtype: torch.dtype | None = None, trainable: bool = False
) -> Injection:
    """Applies one or more adapters to any model and returns the `Injection` that switches, extracts and ejects them.

    Live factors lie on the device of their layer, in `dtype` (default: that of the layer's weight). On a bf16 layer,
    fp32 factors have the gradients of PEFT's default; those of bf16 factors show the rounding of the factors
    (tests/oracle/test_peft.py measures both). Raises AdapterError, with all faults listed and the model untouched, when
    names, shapes or frozen copies do not agree.
    """
    refuse_injected(model)
    if not adapters:
        raise AdapterError("No adapter was given to inject.")
    layers = [_live_layers(model, adapter, dtype, trainable) for adapter in adapters]
    injection = Injection(model, adapters, layers)
    injection._apply()
    return injection


def choose_for(model: nn.Module, adapter: Adapter) -> list[Target]:
    """The targets of an adapter that exists, in its order; raises AdapterError with everything that does not fit."""
    candidates = {c[0]: c for c in _candidates(model)}
    faults = [fault for name in adapter.factors for fault in _misfit(name, adapter, candidates)]
    faults += _without_factors(adapter, list(candidates.values()))
    faults += [fault for name, copy in adapter.base_copies.items() for fault in _changed_copy(name, copy, candidates)]
    if faults:
        raise AdapterError("This adapter does not fit the model:\n" + bullet_list(faults))
    return [_target(candidates[name], adapter.spec, adapter.modules) for name in adapter.factors]


def _live_layers(
    model: nn.Module, adapter: Adapter, dtype: torch.dtype | None, trainable: bool
) -> dict[str, AdaptedLayer]:
    return {target.name: _live_layer(target, adapter, dtype, trainable) for target in choose_for(model, adapter)}


def _misfit(name: str, adapter: Adapter, candidates: dict[str, Any]) -> list[str]:
    if name not in candidates:
        return [f"{name}: the model has no such layer; {_nearest(name, list(candidates))}"]
    target = _target(candidates[name], adapter.spec, ())
    expected = {"A": target.A_shape, "B": target.B_shape, "magnitude": target.matrix_shape[:1]}
    return [
        f"{name}: {part} has shape {list(tensor.shape)}, the model needs {list(expected[part])}"
        for part, tensor in adapter.factors[name].tensors()
        if tuple(tensor.shape) != expected[part]
    ]


def _without_factors(adapter: Adapter, candidates: list[Candidate]) -> list[str]:
    """Layers that target_modules select in this model but that have no factors: half of the file is gone."""
    selected = [
        candidate[0]
        for candidate in candidates
        if candidate[1] not in ("parameter", "parameter_transposed")
        and first_match(_module_of(candidate), adapter.modules)
    ]
    return [
        f"{name}: the adapter's target_modules select it, but the adapter has no factors for it"
        for name in selected
        if name not in adapter.factors
    ]


def _changed_copy(name: str, copy: Tensor, candidates: dict[str, Any]) -> list[str]:
    layer = name.removesuffix(BIAS)
    holder, parameter = candidates[layer][3:5] if layer in candidates else (nn.Module(), "weight")
    parameter = "bias" if name.endswith(BIAS) else parameter
    if getattr(holder, parameter, None) is None:
        return [f"{name}: the file holds a copy of a frozen weight that the model does not have"]
    same = weight_shape(holder, parameter) == copy.shape
    if same and not getattr(holder, parameter).is_meta:  # of a model without weights the shape is all there is
        weight = (getattr(holder, parameter).detach() if parameter == "bias" else dense_weight(holder, parameter)).cpu()
        same = torch.equal(weight, copy.to(weight.dtype)) or torch.equal(weight.to(copy.dtype), copy)  # either rounded
    if not same:
        return [f"{name}: the file's copy of the frozen weight differs from the model's; this is another base"]
    return []


def _live_layer(target: Target, adapter: Adapter, dtype: torch.dtype | None, trainable: bool) -> AdaptedLayer:
    weight = getattr(target.holder, target.parameter)
    factors = adapter.factors[target.name]
    live = {
        part: tensor.detach().to(weight.device, dtype or weight.dtype, copy=True).requires_grad_(trainable)
        for part, tensor in factors.tensors()
    }
    return AdaptedLayer(target, live["A"], live["B"], live.get("magnitude"), adapter.spec.dropout)
