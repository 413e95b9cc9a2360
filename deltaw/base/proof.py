"""The proof, on every loaded model, that the kernels compute what its modules compute: loss and gradients compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter
from deltaw.base import forward
from deltaw.base.decoder import Decoder
from deltaw.base.forward import PROOF_LENGTHS, flat_logits, plain_attention, proof_tokens
from deltaw.base.reading import Unreadable
from deltaw.kernels import spans_of

# Largest relative difference of the loss, and of each gradient, that still counts as the same computation.
PROOF_TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (2e-2, 0.3)}
NEGLIGIBLE = 1e-5


def prove(model: Any) -> tuple[str | None, Decoder | None, str | None]:
    """(why documents go one at a time, the decoder, why modules run instead of it) of a loaded model.

    Afterwards the model carries the attention that belongs to that.
    """
    forward.forget_lengths(model)
    reason = forward.prove(model)
    if reason is not None:
        return reason, None, None
    decoder, module_reason = prove_decoder(model)
    if decoder is None and (reason := _reason_against_rows(model)):
        model.set_attn_implementation(forward.own_attention(model))
        return reason, None, None
    return None, decoder, module_reason


def _reason_against_rows(model: Any) -> str | None:
    """Why the modules of a model cannot take documents in a row. A decoder has only attention, which is proved."""
    try:
        mixed = forward.mixes_documents(model)
    except Exception as error:  # a model may object to a gradient in any way it likes
        return f"its modules give no gradient of a row ({type(error).__name__}: {error})"
    return "it mixes the tokens of neighbouring documents by other means than attention" if mixed else None


def prove_decoder(model: Any) -> tuple[Decoder | None, str | None]:
    """(the decoder, None) when loss and gradients of two documents are those of the model's own forward; else why not.

    The gradients are those of a small random adapter on every linear layer, and of the embedded tokens.
    """
    try:
        decoder = Decoder(model)
        reason = _difference(model, decoder)
    except Unreadable as error:
        return None, str(error)
    except Exception as error:  # a model may object to being run by its parts in any way it likes
        return None, f"it cannot be run by its parts ({type(error).__name__}: {error})"
    return (decoder, None) if reason is None else (None, reason)


def _difference(model: Any, decoder: Decoder) -> str | None:
    documents = [proof_tokens(model, length) for length in PROOF_LENGTHS]
    spans = spans_of(list(accumulate(PROOF_LENGTHS, initial=0)))
    positions_T = torch.cat([torch.arange(length, device=model.device) for length in PROOF_LENGTHS])

    def by_modules() -> Tensor:
        with plain_attention(model):
            return torch.cat([model(input_ids=document[None], use_cache=False).logits[0] for document in documents])

    def by_kernels() -> Tensor:
        return flat_logits(model, decoder.hidden_states(torch.cat(documents), positions_T, spans))

    spec = LoraSpec(rank=2, alpha=4)
    adapter = new_adapter(choose(model, spec), spec, seed=1)
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: Factors(found.A, 0.02 * torch.randn(found.B.shape, generator=generator))
        for name, found in adapter.factors.items()
    }
    with inject(model, adapter.with_factors(drawn), trainable=True, dtype=torch.float32) as injection:
        factors = {f"{part} of {name}": tensor for name, part, tensor in injection.trained()}
        plain, fast = (_measure(model, forward, factors, documents) for forward in (by_modules, by_kernels))
    return _first_difference(plain, fast, *PROOF_TOLERANCE[model.dtype])


def _measure(
    model: Any, forward: Callable[[], Tensor], factors: Mapping[str, Tensor], documents: list[Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss of the documents and its gradients."""
    embedded: list[Tensor] = []

    def lead(_module: Any, _args: Any, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(lead)
    try:
        with torch.enable_grad():
            logits_TV = forward().float()
            parts = zip(logits_TV.split(PROOF_LENGTHS), documents, strict=True)
            loss = torch.stack([F.cross_entropy(logits[:-1], d[1:], reduction="sum") for logits, d in parts]).sum()
            found = torch.autograd.grad(loss, [*factors.values(), *embedded], allow_unused=True)
    finally:
        handle.remove()
    size = len(factors)
    slopes = {name: grad for name, grad in zip(factors, found[:size], strict=True) if grad is not None}
    slopes["the embedded tokens"] = torch.cat([grad.flatten(0, -2) for grad in found[size:]])
    return float(loss.detach()), slopes


def _first_difference(
    plain: tuple[float, dict[str, Tensor]], fast: tuple[float, dict[str, Tensor]], loss_most: float, slope_most: float
) -> str | None:
    apart = abs(fast[0] / plain[0] - 1)
    if not apart <= loss_most:
        return f"its loss by kernels differs from its own by {apart:.1e} (relative)"
    largest = max(float(slope.norm()) for slope in plain[1].values())
    for name, slope in plain[1].items():
        size = float(slope.norm())
        if size < NEGLIGIBLE * largest:
            continue
        apart = float((fast[1][name] - slope).norm()) / size if name in fast[1] else 1.0
        if not apart <= slope_most:
            return f"the gradient of {name} by kernels differs from its own by {apart:.1e} (relative)"
    return None
