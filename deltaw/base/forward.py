"""How a flat ragged batch passes through a transformers model, and the proof that it may.

transformers lets a caller register an attention function by name; keyword arguments of the decoder arrive in it
unchanged. So one registration carries `bounds` to every layer of every architecture, and no model code is copied. An
architecture that mixes tokens in other ways, or whose head does something unknown, is found out by `prove`, and its
documents then go through the model's own forward one at a time: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from deltaw.kernels import document_attention

ATTENTION_NAME = "deltaw_flat"
# Largest relative difference between the flat and the model's own forward that still counts as the same computation.
PROOF_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _flat_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    bounds: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None and bounds is not None, "flat attention takes bounds, not a mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_THD = document_attention(query[0], key[0], value[0], bounds, scale, sliding_window, softcap)
    return out_THD[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> None:
    """Makes `ATTENTION_NAME` known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, _flat_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def flat_hidden_states(model: Any, tokens_T: Tensor, positions_T: Tensor, bounds: Sequence[int]) -> Tensor:
    """Final hidden states [T, H] of a flat row of documents."""
    output = model.base_model(
        input_ids=tokens_T[None],
        position_ids=positions_T[None],
        attention_mask=None,
        use_cache=False,
        bounds=tuple(bounds),
    )
    return output.last_hidden_state[0]


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

    The model must carry the flat attention; its own attention is switched on for the comparison and off again.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    documents = [(torch.arange(n) * 7919 + 11 * n) % vocabulary for n in (9, 6)]
    device = next(model.parameters()).device
    tokens_T = torch.cat(documents).to(device)
    positions_T = torch.cat([torch.arange(len(d)) for d in documents]).to(device)
    try:
        flat = flat_logits(model, flat_hidden_states(model, tokens_T, positions_T, (0, 9, 15))).float()
    except Exception as error:  # an architecture may reject flat batches in any way it likes
        return f"its forward does not take flat batches ({type(error).__name__}: {error})"
    with plain_attention(model):
        plain = torch.cat([model(input_ids=d[None].to(device), use_cache=False).logits[0] for d in documents]).float()
    difference = float((flat - plain).abs().max() / plain.abs().max().clamp_min(1e-9))
    if not difference <= PROOF_TOLERANCE[next(model.parameters()).dtype]:
        return f"its flat logits differ from its own by {difference:.1e} (relative)"
    return None


class plain_attention:
    """While inside, the model computes attention in its own way: needed for generation with a cache, and for `prove`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.previous = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self.previous)
