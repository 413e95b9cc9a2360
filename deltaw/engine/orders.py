"""Which directions of an adapter to keep first: by size, by what inputs make of them, or by what the loss says.

Size is in the factors alone (deltaw/analysis/spectrum.py). The other two need data, which is not what they are later
measured on. Layers of the plain kinds only: a linear layer with one input.

Legend: T tokens, O outputs, I inputs, R ranks, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter import Adapter, inject
from deltaw.analysis.spectrum import Spectrum, matrices, spectrum_of
from deltaw.analysis.truncate import Spectra, truncate
from deltaw.base.load import Base
from deltaw.data.pack import Batch
from deltaw.engine.objective import batch_loss, head_factors, score_batch
from deltaw.errors import AdapterError

# Added to a second moment, as a share of its trace, so that directions which no input has do not break a factorisation.
RIDGE = 1e-9


def require_plain(adapter: Adapter) -> None:
    """Raises AdapterError where a layer has no single input that its A is multiplied with."""
    odd = [name for name, factors in adapter.factors.items() if factors.A.ndim != 2 or name in adapter.embeddings]
    odd += [name for name in adapter.parameter_names if name not in odd]
    if odd or adapter.spec.dora:
        what = "a DoRA adapter" if adapter.spec.dora else f"layers such as {odd[0]}"
        raise AdapterError(f"Directions can be ordered by data for plain linear layers, not for {what}.")


def by_activations(base: Base, adapter: Adapter, batches: Sequence[Batch]) -> dict[str, Spectrum]:
    """Each ΔW in the directions U of ΔW·C^½, C the second moment of the layer's inputs: U·Uᵀ·ΔW, most output first.

    Keeping the first k minimises ‖(ΔW − ΔW_k)X‖_F over these inputs. With M the second moment of A·x, M = L·Lᵀ, they
    are the left singular vectors of s·B·L. Rows of V are not orthogonal then, but the product is ΔW.
    """
    found = {}
    for name, moment_RR in _moments(base, adapter, batches).items():
        A, B = matrices(adapter, name)
        B = adapter.scale_of(name) * B
        ridge = RIDGE * moment_RR.trace().clamp_min(torch.finfo(torch.float64).tiny)
        L_RR = torch.linalg.cholesky(moment_RR + ridge * torch.eye(len(moment_RR), dtype=torch.float64))
        U_OK = spectrum_of(L_RR, B, 1.0).U_OK
        V_KI = (U_OK.mT @ B) @ A
        size_K = V_KI.norm(dim=1)
        found[name] = Spectrum(U_OK, size_K, (V_KI / size_K[:, None].clamp_min(1e-300)).mT)
    return found


def _moments(base: Base, adapter: Adapter, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Σ (A·x)(A·x)ᵀ over the tokens, [R, R] in fp64, of every layer with the adapter at work."""
    sums: dict[str, Tensor] = {}
    with inject(base.model, adapter, dtype=base.dtype) as injection:

        def watch(name: str, A: Tensor) -> Any:
            sums[name] = torch.zeros(len(A), len(A), dtype=torch.float64)

            def before(_module: Any, args: tuple[Any, ...]) -> None:
                low_TR = (args[0].reshape(-1, A.shape[1]).to(A.dtype) @ A.mT).cpu().double()
                sums[name] += low_TR.mT @ low_TR

            return before

        # A hook sends the forward through the modules, whose inputs it sees.
        layers = injection.layers[0].items()
        handles = [layer.target.owner.register_forward_pre_hook(watch(name, layer.A)) for name, layer in layers]
        try:
            for batch in batches:
                score_batch(base, batch)
        finally:
            for handle in handles:
                handle.remove()
    return sums


def by_loss(base: Base, adapter: Adapter, known: Spectra, batches: Sequence[Batch]) -> tuple[Spectra, Spectra]:
    """(components in the order of their worth, worth as the σ² of a Spectrum) from gates gᵢ in ΔW = Σ gᵢσᵢuᵢvᵢᵀ.

    After training the mean gradient is near zero, so taking one out costs about ½·∂²L/∂g²; the curvature is the mean
    square of the gradient over batches (empirical Fisher). ∂L/∂gᵢ = Σ_o B[o, i]·∂L/∂B[o, i].
    """
    ranks = {name: found.sigma_K.shape[-1] for name, found in known.items()}
    slopes: dict[str, list[Tensor]] = {name: [] for name in adapter.factors}
    whole = truncate(adapter, ranks, known)
    with inject(base.model, whole, dtype=torch.float32, trainable=True) as injection:
        for batch in batches:
            with torch.enable_grad():
                loss = batch_loss(base, batch, head_factors(base, injection)) / max(1, batch.trained_tokens)
                loss.backward()
            for name, layer in injection.layers[0].items():
                assert layer.B.grad is not None
                slopes[name].append((layer.B.detach() * layer.B.grad).cpu().double().sum(0))
                layer.B.grad = layer.A.grad = None
    ordered, worth = {}, {}
    for name, rows in slopes.items():
        value_K = 0.5 * torch.stack(rows).square().mean(0)
        order = value_K.argsort(descending=True, stable=True)
        U, sigma, V = known[name]
        ordered[name] = Spectrum(U[:, order], sigma[order], V[:, order])
        worth[name] = Spectrum(U, value_K[order].sqrt(), V)
    return ordered, worth
