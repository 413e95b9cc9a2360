"""Every formula of the low-rank core, each with its paper. Tensors in, tensors out; no modules, no state.

Legend: T tokens, I inputs, O outputs, R rank, E experts, V vocabulary, D width of an embedding.
Factors are A_RI and B_OR, for experts A_ERI and B_EOR; a convolution's A is [R, I, *kernel], its B [O, R, 1, …].
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def scale(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """s of ΔW = s·B·A: alpha/r (LoRA, arXiv 2106.09685 §4.1), or alpha/√r (rsLoRA, arXiv 2312.03732 eq. 7)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def delta(A_RI: Tensor, B_OR: Tensor, s: float, *, transposed: bool = False) -> Tensor:
    """ΔW = s·B·A, [O, I] or batched [E, O, I] (arXiv 2106.09685 eq. 3); `transposed` gives [.., I, O].

    Transposed weights are those of transformers' Conv1D, of embeddings, and of some experts.
    """
    product = s * (B_OR @ A_RI)
    return product.transpose(-1, -2) if transposed else product


def init_A(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """A of a new adapter in fp32: uniform in ±1/√fan_in, which is what Kaiming with a = √5 gives in every LoRA tool."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def row_norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, s: float) -> Tensor:
    """‖W + s·B·A‖ of each output row, [O] in fp32, without forming the sum (DoRA, arXiv 2402.09353 eq. 5).

    ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·wᵀ) + s²·b·(A·Aᵀ)·bᵀ costs one thin product instead of a dense ΔW.
    """
    A_RI, B_OR = A_RI.float(), B_OR.float()
    W_OI = W_OI.float()
    cross_OR = W_OI @ A_RI.T
    gram_RR = A_RI @ A_RI.T
    square_O = W_OI.square().sum(1) + 2 * s * (B_OR * cross_OR).sum(1) + s * s * ((B_OR @ gram_RR) * B_OR).sum(1)
    return square_O.clamp_min(0).sqrt()


def dora_weight(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, s: float, magnitude_O: Tensor) -> Tensor:
    """m ∘ (W + s·B·A) / ‖W + s·B·A‖, rows being outputs: the dense reference of DoRA (arXiv 2402.09353 eq. 5)."""
    V_OI = W_OI + s * (B_OR @ A_RI)
    return dora_gain(magnitude_O, V_OI.norm(dim=1))[:, None] * V_OI


def dora_gain(magnitude_O: Tensor, norm_O: Tensor) -> Tensor:
    """m / ‖W + s·B·A‖ in fp32; rows that are all zero (an output head's row for padding) stay zero instead of NaN."""
    return magnitude_O.float() / norm_O.masked_fill(norm_O == 0, 1)


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed that depends on the name: a module's start does not depend on which others are adapted."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
