"""How a flat ragged batch passes through a transformers model, and the proof that it may.

transformers lets a caller register an attention function by name; keyword arguments of the decoder arrive in it
unchanged. So one registration carries `bounds` to every layer of every architecture, and no model code is copied. An
architecture that mixes tokens in other ways, or whose head does something unknown, is found out by `prove`, and its
documents then go through the model's own forward one at a time: slower, never wrong.

What a mask would have said must reach the attention function in another way, or a short proof could not see that it is
missing. So the mask function hands on the window that its mask would have, and attention compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from deltaw.base.reading import TOLD, Told
from deltaw.kernels import document_attention, spans_of

ATTENTION_NAME = "deltaw_flat"
# Largest relative difference between the flat and the model's own forward that still counts as the same computation.
# Many layers round to more: then it may be so many times what two attentions of the model itself differ by.
PROOF_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# What is wrong differs by eight times that and more (dev/LOG.md). Beyond seven tolerances it is no rounding any more.
ROUGHNESS_FACTOR, MOST_TOLERANCES = 3, 7
PROOF_LENGTHS = (9, 6)  # tokens of the two documents that proofs look at
_UNSCALED = "original_inv_freq"  # how transformers' rotary modules call their frequencies before any scaling
EAGER = "eager"  # the attention of transformers that every model has


def _flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | None,
    scaling: float | None = None,
    bounds: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if bounds is None or attention_mask != sliding_window:
        raise NotImplementedError(f"attention got window {sliding_window}, but its mask {attention_mask}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    module.__dict__[TOLD] = Told(scale, sliding_window, softcap)
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return document_attention(q_THD, k_TKD, v_TKD, spans_of(bounds), scale, sliding_window, softcap)[None], None


def _flat_mask(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> int | None:
    """What stands for the mask: the window that it would have. A mask of some other form is refused."""
    if use_vmap:
        raise NotImplementedError("a mask that is more than causal")
    return local_size


def register() -> None:
    """Makes `ATTENTION_NAME` known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, _flat_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _flat_mask)


def flat_hidden_states(model: Any, tokens_T: Tensor, positions_T: Tensor, bounds: Sequence[int]) -> Tensor:
    """Final hidden states [T, H] of a flat row of documents."""
    if not may_be_flat(model, bounds):
        alone = [(tokens_T[a:b], positions_T[a:b], (0, b - a)) for a, b in pairwise(bounds)]
        return torch.cat([flat_hidden_states(model, *document) for document in alone])
    output = model.base_model(
        input_ids=tokens_T[None],
        position_ids=positions_T[None],
        attention_mask=None,
        use_cache=False,
        bounds=tuple(bounds),
    )
    return output.last_hidden_state[0]


def may_be_flat(model: Any, bounds: Sequence[int]) -> bool:
    """Whether these documents may share a row: their rotary angles do not depend on each other."""
    longest = max(stop - start for start, stop in pairwise(bounds))
    return len(bounds) == 2 or longest <= independent_tokens(model.config.get_text_config())


def forget_lengths(model: Any) -> None:
    """Has rotary angles follow from the positions of a call: "dynamic" scaling keeps what the longest made of them."""
    if "dynamic" not in {kind.get("rope_type") for kind in _scalings(model.config.get_text_config())}:
        return
    for module in model.modules():
        if any(name.endswith(_UNSCALED) for name, _ in module.named_buffers(recurse=False)):
            module.register_forward_pre_hook(_unscale)


def _unscale(module: nn.Module, _args: Any) -> None:
    for name, original in list(module.named_buffers(recurse=False)):
        prefix, found, _ = name.rpartition(_UNSCALED)
        if found:
            setattr(module, f"{prefix}inv_freq", original)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def independent_tokens(config: Any) -> float:
    """Up to which length a document's rotary angles do not depend on its neighbours: no bound for most models.

    The scalings "dynamic" and "longrope" choose the angles of a whole batch by its largest position.
    """
    return min(
        (
            kind.get("original_max_position_embeddings") or config.max_position_embeddings
            for kind in _scalings(config)
            if kind.get("rope_type") in ("dynamic", "longrope")
        ),
        default=math.inf,
    )


def _scalings(config: Any) -> list[dict[str, Any]]:
    """How rotary angles are made; for some models once for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def flat_logits(model: Any, h_NH: Tensor) -> Tensor:
    """Logits [N, V] from hidden states, with the scale and soft cap that the config names."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(h_NH)
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def prove(model: Any) -> str | None:
    """None when the flat forward agrees with the model's own on two documents, else a sentence saying how it differs.

    Afterwards the model carries the flat attention if that is so, and its own attention if not.
    """
    register()
    reason = _difference(model)
    model.set_attn_implementation(own_attention(model) if reason else ATTENTION_NAME)
    return reason


def _difference(model: Any) -> str | None:
    documents = [proof_tokens(model, length) for length in PROOF_LENGTHS]
    positions_T = torch.cat([torch.arange(len(d), device=model.device) for d in documents])

    def own(attention: str) -> Tensor:
        with plain_attention(model, attention):
            return torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in documents]).float()

    plain = own(own_attention(model))
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        if model.config.get_text_config()._attn_implementation != ATTENTION_NAME:
            return "its attention cannot be exchanged"
        bounds = (0, *accumulate(PROOF_LENGTHS))
        flat = flat_logits(model, flat_hidden_states(model, torch.cat(documents), positions_T, bounds)).float()
    except Exception as error:  # an architecture may reject flat batches in any way it likes
        return f"its forward does not take flat batches ({type(error).__name__}: {error})"
    difference, tolerance = _relative(flat, plain), PROOF_TOLERANCE[model.dtype]
    if difference <= tolerance:
        return None
    roughness = _relative(own(EAGER), plain)
    if difference <= min(ROUGHNESS_FACTOR * roughness, MOST_TOLERANCES * tolerance):
        return None
    return (
        f"its flat logits differ from its own by {difference:.1e} (relative), its own from its own by {roughness:.1e}"
    )


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


def proof_tokens(model: Any, length: int) -> Tensor:
    """Some token ids [length] that are valid for the model, the same every time."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(length, device=model.device) * 7919 + 11 * length) % vocabulary


def sees_later_tokens(model: Any) -> bool:
    """Whether a logit depends on a later token: such a model reads in both directions and cannot learn to write.

    Asked of the gradient, which is exactly zero where a mask stands between, whatever the dtype rounds away.
    """
    tokens_T, seen = proof_tokens(model, 9), 5
    slope_TH = _slope(model, lambda: model(input_ids=tokens_T[None], use_cache=False).logits[0, :seen])
    return bool(slope_TH[seen:].count_nonzero())


def mixes_documents(model: Any) -> bool:
    """Whether of two documents in a row the second depends on the first, as by a convolution; asked as above.

    However little it is: with the weights of an untrained model it may be less than what is allowed for rounding.
    """
    bounds, border = (0, *accumulate(PROOF_LENGTHS)), PROOF_LENGTHS[0]
    if not may_be_flat(model, bounds):
        return False
    tokens_T = torch.cat([proof_tokens(model, length) for length in PROOF_LENGTHS])
    positions_T = torch.cat([torch.arange(length, device=model.device) for length in PROOF_LENGTHS])
    slope_TH = _slope(model, lambda: flat_hidden_states(model, tokens_T, positions_T, bounds)[border:])
    return bool(slope_TH[:border].count_nonzero())


def _slope(model: Any, forward: Callable[[], Tensor]) -> Tensor:
    """How the squares of what a forward gives depend on the embedded tokens, [T, H]."""
    rows: list[Tensor] = []

    def lead(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        rows.append(out.detach().requires_grad_())
        return rows[-1]

    handle = model.get_input_embeddings().register_forward_hook(lead)
    try:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(forward().float().square().sum(), rows)
    finally:
        handle.remove()
    return slope.view(-1, slope.shape[-1])


def recompute_modules(blocks: Sequence[nn.Module], count: int) -> None:
    """Has the first `count` blocks, where they run as modules, keep their input for backward and nothing else."""
    for number, block in enumerate(blocks):
        block.__dict__.pop("forward", None)
        if number < count:
            block.__dict__["forward"] = Recomputed(block.forward)


class Recomputed:
    """A module's forward that is computed again in backward, instead of what it would keep."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def own_attention(model: Any) -> str:
    """The name of the attention that transformers would choose for this model, but that "sdpa" knows no soft cap.

    Older versions of transformers take it for Gemma 2 and leave the cap out.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not capped else EAGER


class plain_attention:
    """While inside, the model computes attention in its own way (or `name`): needed for generation with a cache."""

    def __init__(self, model: Any, name: str | None = None) -> None:
        self.model, self.name = model, name or own_attention(model)

    def __enter__(self) -> None:
        self.previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self.previous)
