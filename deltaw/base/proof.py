"""The proof, on every loaded model, that the kernels compute what its modules compute: hidden states and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import Factors, Injection, LoraSpec, choose, inject, new_adapter
from deltaw.base import forward
from deltaw.base.builtin import cache_folder
from deltaw.base.decoder import Decoder
from deltaw.base.formed import widened
from deltaw.base.forward import PROOF_LENGTHS, plain_attention, proof_tokens
from deltaw.base.reading import Unreadable
from deltaw.kernels import compiled, spans_of

# Largest relative difference of the hidden states, and of each gradient, that still counts as the same computation:
# where all is computed in fp32, and where parts that both ways call compute in bf16.
PROOF_TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (2e-2, 0.3)}
ROUNDED_TOLERANCE = 0.3  # of hidden states by kernels in the dtype of the model from those in fp32
NEGLIGIBLE = 1e-5  # a gradient, beside the largest


def prove(model: Any) -> tuple[str | None, Decoder | None, str | None]:
    """(why documents go one at a time, the decoder, why modules run instead of it) of a loaded model.

    Afterwards the model carries the attention that belongs to that. On CPU the compiled passes are taken into use
    first, so what they compute is proved too.
    """
    if model.device.type == "cpu":
        prepare_passes()
    forward.forget_lengths(model)
    reason = forward.prove(model)
    if reason is not None:
        return reason, None, None
    decoder, module_reason = prove_decoder(model)
    if decoder is None and compiled.in_use():
        with compiled.left_out():
            decoder, _ = prove_decoder(model)
        if decoder is not None:
            compiled.leave_out(f"with them, {module_reason}")
    if decoder is None and (reason := _reason_against_rows(model)):
        model.set_attn_implementation(forward.own_attention(model))
        return reason, None, None
    return None, decoder, module_reason


def prepare_passes() -> str | None:
    """Takes the compiled passes of deltaw/kernels into use; None, or why torch does their work instead."""
    return compiled.prepare(cache_folder() / "compiled")


def _reason_against_rows(model: Any) -> str | None:
    """Why the modules of a model cannot take documents in a row. A decoder has only attention, which is proved."""
    try:
        mixed = forward.mixes_documents(model)
    except Exception as error:  # a model may object to a gradient in any way it likes
        return f"its modules give no gradient of a row ({type(error).__name__}: {error})"
    return "it mixes the tokens of neighbouring documents by other means than attention" if mixed else None


def prove_decoder(model: Any) -> tuple[Decoder | None, str | None]:
    """(the decoder, None) when it computes two documents as the modules do; else why not.

    Compared are the final hidden states, and the gradients of a small random adapter on every linear layer and of the
    embedded tokens; the head is none of the kernels', and what follows it is proved by `forward.prove`.
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
    tokens_T = torch.cat([proof_tokens(model, length) for length in PROOF_LENGTHS])
    positions_T = torch.cat([torch.arange(length, device=model.device) for length in PROOF_LENGTHS])
    spans = spans_of(list(accumulate(PROOF_LENGTHS, initial=0)))

    def by_modules() -> Tensor:
        with plain_attention(model):
            parts = [model.base_model(input_ids=part[None], use_cache=False) for part in tokens_T.split(PROOF_LENGTHS)]
        return torch.cat([part.last_hidden_state[0] for part in parts])

    def by_kernels() -> Tensor:
        return decoder.hidden_states(tokens_T, positions_T, spans)

    with _small_adapter(model) as injection:
        factors = {f"{part} of {name}": tensor for name, part, tensor in injection.trained()}
        with _in_fp32(model, decoder):
            plain, fast = (_measure(model, forward, factors) for forward in (by_modules, by_kernels))
        with torch.no_grad():
            rounded_TH = fast[0] if model.dtype == torch.float32 else by_kernels()
    exact = all(block.other is None for block in decoder.blocks)
    reason = _first_difference(plain, fast, *PROOF_TOLERANCE[torch.float32 if exact else model.dtype])
    if reason is None and not (apart := _apart(rounded_TH, plain[0])) <= ROUNDED_TOLERANCE:
        return f"its hidden states by kernels, in {model.dtype}, differ from those in fp32 by {apart:.1e} (relative)"
    return reason


def _small_adapter(model: Any) -> Injection:
    """Random factors at work beside every linear layer."""
    spec = LoraSpec(rank=2, alpha=4)
    adapter = new_adapter(choose(model, spec), spec, seed=1)
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: Factors(found.A, 0.02 * torch.randn(found.B.shape, generator=generator))
        for name, found in adapter.factors.items()
    }
    return inject(model, adapter.with_factors(drawn), trainable=True, dtype=torch.float32)


@contextmanager
def _in_fp32(model: Any, decoder: Decoder) -> Iterator[None]:
    """Whatever the kernels take on themselves computes in fp32, for them and for the modules, with the same weights.

    Two ways to compute in bf16 may differ by a third in a gradient that both have right: each is as far from the exact
    one (dev/LOG.md). What kernels call as it is keeps its dtype: embedded tokens, and what stands in place of an MLP.
    """
    if model.dtype == torch.float32:
        yield
        return
    others = [block.other for block in decoder.blocks if block.other is not None]
    handles = [model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.float())]
    handles += [part.register_forward_pre_hook(lambda _, args: (args[0].to(model.dtype), *args[1:])) for part in others]
    handles += [part.register_forward_hook(lambda _module, _args, out: out.float()) for part in others]
    try:
        with widened(layer for block in decoder.blocks for layer in block.layers()):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    model: Any, forward: Callable[[], Tensor], factors: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The final hidden states [T, H], and the gradients of their product with random numbers."""
    embedded: list[Tensor] = []

    def lead(_module: Any, _args: Any, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(lead)
    try:
        with torch.enable_grad():
            h_TH = forward()
            slope_TH = torch.randn(h_TH.shape, generator=torch.Generator().manual_seed(2)).to(h_TH)
            found = torch.autograd.grad(h_TH, [*factors.values(), *embedded], slope_TH, allow_unused=True)
    finally:
        handle.remove()
    size = len(factors)
    slopes = {name: grad for name, grad in zip(factors, found[:size], strict=True) if grad is not None}
    slopes["the embedded tokens"] = torch.cat([grad.flatten(0, -2) for grad in found[size:]])
    return h_TH.detach(), slopes


def _first_difference(
    plain: tuple[Tensor, dict[str, Tensor]],
    fast: tuple[Tensor, dict[str, Tensor]],
    states_most: float,
    slope_most: float,
) -> str | None:
    if not (apart := _apart(fast[0], plain[0])) <= states_most:
        return f"its hidden states by kernels differ from its own by {apart:.1e} (relative)"
    largest = max(float(slope.norm()) for slope in plain[1].values())
    for name, slope in plain[1].items():
        if float(slope.norm()) < NEGLIGIBLE * largest:
            continue
        apart = _apart(fast[1][name], slope) if name in fast[1] else 1.0
        if not apart <= slope_most:
            return f"the gradient of {name} by kernels differs from its own by {apart:.1e} (relative)"
    return None


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())
