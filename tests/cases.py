"""One small model for each kind of layer that can be adapted, with settings, inputs and factors drawn for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from models import VOCABULARY, small_model
from torch import Tensor, nn

from deltaw.adapter import Adapter, LoraSpec, choose, new_adapter


class Convolutional(nn.Module):
    """Two convolutions of `dimensions` dimensions and a linear classifier of 5 classes."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first = convolution(3, 6, 3, stride=2, padding=1)
        self.second = convolution(6, 8, 1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.second(F.relu(self.first(images))).flatten(2).mean(-1))


class VisionTransformer(nn.Module):
    """Patches by a convolution, a 3-D position parameter, PyTorch's own encoder, a classifier of 5 classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 4, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.classifier = nn.Linear(width, 5)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.encoder(x, src_key_padding_mask=padding)[:, 0])


@dataclass(frozen=True)
class Case:
    """A model, what is adapted in it, and how it is called."""

    model: Callable[[], Any]
    spec: LoraSpec
    inputs: Callable[[], Tensor]

    def adapter(self, model: nn.Module, seed: int = 0) -> Adapter:
        """An adapter for the model whose factors all have an effect."""
        return drawn(new_adapter(choose(model, self.spec), self.spec, seed), seed)


def drawn(adapter: Adapter, seed: int = 0) -> Adapter:
    """B from N(0, 0.02), so that A has gradients; an embedding's A and DoRA's magnitudes moved off their start."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, factors in adapter.factors.items():
        factors.B.normal_(0, 0.02, generator=generator)
        if name in adapter.embeddings:
            factors.A.normal_(generator=generator)
        if factors.magnitude is not None:
            factors.magnitude.mul_(torch.empty_like(factors.magnitude).normal_(1, 0.05, generator=generator))
    return adapter


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of a language model or of a plain network."""
    out = model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def loss_of(logits: Tensor) -> Tensor:
    """Cross entropy with classes drawn once."""
    classes = torch.randint(logits.shape[-1], (logits[..., 0].numel(),), generator=torch.Generator().manual_seed(5))
    return F.cross_entropy(logits.flatten(0, -2).float(), classes)


def made(network: Callable[[], nn.Module]) -> nn.Module:
    """A network with fixed random weights, in train mode: in eval mode PEFT loses to PyTorch's fused encoder."""
    torch.manual_seed(0)
    return network().train()


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))


def images(*shape: int) -> Tensor:
    return torch.randn(4, 3, *shape, generator=torch.Generator().manual_seed(3))


def _text(kind: str, **settings: Any) -> Case:
    return Case(partial(small_model, kind), LoraSpec(rank=4, alpha=8, **settings), tokens)


def _net(network: Callable[[], nn.Module], shape: tuple[int, ...], **settings: Any) -> Case:
    return Case(partial(made, network), LoraSpec(rank=4, alpha=8, **settings), partial(images, *shape))


CONVOLUTIONS = ("first", "second", "classifier")
CASES: dict[str, Case] = {
    "plain": _text("llama"),
    "rslora": _text("llama", rslora=True),
    "dora": _text("llama", dora=True),
    "patterns": _text(
        "llama",
        # In alphabetical order, since PEFT sorts patterns when it saves them, although the first match wins.
        rank_pattern={"down_proj": 6, "layers.0.self_attn.v_proj": 3, "v_proj": 2},
        alpha_pattern={"layers.1.mlp.up_proj": 16.0, "up_proj": 3.5},
    ),
    "some layers": _text("llama", targets=("q_proj", "down_proj"), layers=(1,)),
    "embedding": _text("llama", targets=("embed_tokens", "q_proj")),
    "scaled embedding": _text("gemma3", targets=("embed_tokens",)),
    "embedding dora": _text("gemma3", targets=("embed_tokens",), dora=True),
    "head": _text("llama", targets=("lm_head", "v_proj")),
    "tied head": _text("llama-tied", targets=("lm_head", "v_proj")),
    "head dora": _text("llama-tied", targets=("lm_head",), dora=True),
    "transposed": _text("gpt2"),
    "transposed dora": _text("gpt2", dora=True),
    "experts": _text("mixtral"),
    "experts of one layer": _text("mixtral", targets=("experts.down_proj", "q_proj"), layers=(0,)),
    "conv1d": _net(partial(Convolutional, 1), (9,), targets=CONVOLUTIONS),
    "conv2d": _net(partial(Convolutional, 2), (8, 8), targets=CONVOLUTIONS),
    "conv3d": _net(partial(Convolutional, 3), (6, 6, 6), targets=CONVOLUTIONS),
    "conv2d dora": _net(partial(Convolutional, 2), (8, 8), targets=CONVOLUTIONS, dora=True),
    "attention": _net(VisionTransformer, (8, 8), targets=("all-linear", "patches")),
}
