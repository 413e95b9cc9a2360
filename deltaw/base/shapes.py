"""What a base is made of, known from its folder alone: no weight is read, and nothing is allocated for one.

The model is built on torch's meta device, so every architecture of transformers tells its own shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from deltaw.base.formed import stored_bytes
from deltaw.base.load import MAX_CONTEXT, check_folder, quiet_transformers
from deltaw.base.locate import locate, open_tokenizer, public_name
from deltaw.base.stream import blocks_of
from deltaw.errors import BaseError


@dataclass(frozen=True)
class Outline:
    """A base before it is opened: name, folder and tokenizer, and a model without weights (on the meta device)."""

    name: str
    folder: Path
    tokenizer: Any
    model: Any

    @cached_property
    def config(self) -> Any:
        """The part of the model's config that speaks of text."""
        return self.model.config.get_text_config()

    @cached_property
    def context_tokens(self) -> int:
        """How many tokens the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", 0) or MAX_CONTEXT)

    @cached_property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @cached_property
    def hidden(self) -> int:
        """Width of the stream between blocks."""
        return int(self.config.hidden_size)

    @cached_property
    def heads(self) -> int:
        """Number of query heads; 1 where an architecture has none."""
        return int(getattr(self.config, "num_attention_heads", None) or 1)

    @cached_property
    def head_width(self) -> int:
        """Width of one head."""
        return int(getattr(self.config, "head_dim", None) or self.hidden // self.heads)

    @cached_property
    def key_heads(self) -> int:
        """Number of heads of keys and values."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @cached_property
    def inner(self) -> int:
        """Width of the MLP, of all experts that see a token."""
        width = mlp_width(self.config, self.hidden)
        experts = getattr(self.config, "num_experts_per_tok", None)
        return int(getattr(self.config, "moe_intermediate_size", None) or width) * experts if experts else width

    @cached_property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections, as those of Llama's kind do, or has one."""
        return any("gate" in name for name, _ in self.model.named_modules())

    @cached_property
    def norms_behind(self) -> int:
        """How many norms of a block stand behind a layer, as in Gemma and OLMo-2, so that their inputs are kept too."""
        block = blocks_of(self.model)[0]
        return 2 if hasattr(block, "post_feedforward_layernorm") else 0

    @cached_property
    def parameters(self) -> int:
        """Numbers in the whole model, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def block_parameters(self) -> int:
        """Numbers in one decoder block; in the largest, where they differ."""
        return max((sum(p.numel() for p in block.parameters()) for block in blocks_of(self.model)), default=0)

    @cached_property
    def head_shape(self) -> tuple[int, int]:
        """(vocabulary, width) of the output head."""
        rows, width = self.model.get_output_embeddings().weight.shape
        return int(rows), int(width)

    @cached_property
    def linear_parameters(self) -> int:
        """Numbers in the linear layers of the blocks: what is stored quantised; stacks of experts are none."""
        modules = [module for block in blocks_of(self.model) for module in block.modules()]
        return sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))

    @cached_property
    def product_parameters(self) -> int:
        """Numbers in the linear layers of the blocks that a token is multiplied with. Of experts, those that see it."""
        return multiplied_parameters([m for block in blocks_of(self.model) for m in block.modules()], self.config)

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files on disk."""
        return stored_bytes(self.folder)


def mlp_width(config: Any, hidden: int) -> int:
    """Inner width of the MLP by its config: of several, the largest; without one, four times the hidden width."""
    width = getattr(config, "intermediate_size", None) or 4 * hidden
    return int(max(width) if isinstance(width, list | tuple) else width)


def multiplied_parameters(modules: Sequence[nn.Module], config: Any) -> int:
    """Numbers in the linear layers among these modules. Of stacked experts, as many as see a token."""
    linear = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear | Conv1D))
    stacked = sum(p.numel() for m in modules for p in m.parameters(recurse=False) if p.dim() == 3)
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return linear + round(stacked * int(config.num_experts_per_tok) / int(count)) if count else linear


def outline(name: str | Path, revision: str | None = None) -> Outline:
    """The outline of a base by built-in name, local folder, GGUF file or hub id. Raises BaseError as `load` would."""
    folder = locate(name, revision)
    check_folder(folder)
    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a strange config makes every part of transformers fail in its own way
        raise BaseError(f"The base in {folder} cannot be opened: {error}") from error
    return Outline(public_name(name), folder, open_tokenizer(folder), model)
