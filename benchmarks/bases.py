"""Bases of published shapes with random weights, written shard by shard: what memory and time are measured on.

A benchmark asks for one by name and gets its folder; it is written once, with the tokenizer of the built-in base, into
the folder that DELTAW_BENCH names (default: .bases beside the benchmarks' project). Usage alone:

    python benchmarks/bases.py NAME ...
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from deltaw.base.locate import locate

FOLDER = Path(os.environ.get("DELTAW_BENCH", Path(__file__).resolve().parents[1] / ".bases"))
TOKENIZER = "smollm2-135m"
SHARD_BYTES = 2_000_000_000
DEVIATION = 0.02


def _llama(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, **rest: Any) -> Any:
    return transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=8192,
        **{"tie_word_embeddings": True, **rest},
    )  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, key_heads: int, **rest: Any) -> Any:
    return transformers.Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, head_dim=128,
        num_key_value_heads=key_heads, vocab_size=151_936, max_position_embeddings=8192,
        **{"tie_word_embeddings": True, **rest},
    )  # fmt: skip


def _gemma3(hidden: int, inner: int, layers: int) -> Any:
    return transformers.Gemma3TextConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4, head_dim=256,
        num_key_value_heads=1, vocab_size=262_144, sliding_window=512, max_position_embeddings=8192,
    )  # fmt: skip


def _neox(hidden: int, inner: int, layers: int, heads: int) -> Any:
    return transformers.GPTNeoXConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=50_304, max_position_embeddings=8192, rotary_pct=0.25,
    )  # fmt: skip


# The published models that these shapes are of.
SHAPES: dict[str, Callable[[], Any]] = {
    "smollm2-135m-shape": lambda: _llama(576, 1536, 30, 9, 3, 49_152),
    "smollm2-360m-shape": lambda: _llama(960, 2560, 32, 15, 5, 49_152),
    "llama-3.2-1b-shape": lambda: _llama(2048, 8192, 16, 32, 8, 128_256),
    "smollm2-1.7b-shape": lambda: _llama(2048, 8192, 24, 32, 32, 49_152),
    "llama-3-8b-shape": lambda: _llama(4096, 14_336, 32, 32, 8, 128_256, tie_word_embeddings=False),
    "qwen3-0.6b-shape": lambda: _qwen3(1024, 3072, 28, 16, 8),
    "qwen3-1.7b-shape": lambda: _qwen3(2048, 6144, 28, 16, 8),
    "gemma-3-270m-shape": lambda: _gemma3(640, 2048, 18),
    "gemma-3-1b-shape": lambda: _gemma3(1152, 6912, 26),
    "pythia-160m-shape": lambda: _neox(768, 3072, 12, 12),
    "pythia-410m-shape": lambda: _neox(1024, 4096, 24, 16),
    "pythia-1.4b-shape": lambda: _neox(2048, 8192, 24, 16),
}


def base(name: str) -> Path:
    """The folder of a base in bf16, written now if it does not stand yet."""
    folder = FOLDER / name
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(SHAPES[name](), folder)
        (folder / "complete").touch()
    return folder


def _write(config: Any, folder: Path) -> None:
    torch.manual_seed(0)
    config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.dtype = "bfloat16"
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    config.save_pretrained(folder)
    tokenizer = locate(TOKENIZER)
    for file in (*tokenizer.glob("*token*"), *tokenizer.glob("*.jinja")):
        shutil.copy(file, folder)
    places, total = {}, 0
    norm = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma's norms add one to what is stored
    shards = list(_shards(config))
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, shape, norm) for name, shape in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(config: Any) -> Iterator[list[tuple[str, torch.Size]]]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    kept = model.state_dict()
    if config.tie_word_embeddings:
        del kept["lm_head.weight"]
    shard: list[tuple[str, torch.Size]] = []
    held = 0
    for name, tensor in kept.items():
        if shard and held + 2 * tensor.numel() > SHARD_BYTES:
            yield shard
            shard, held = [], 0
        shard.append((name, tensor.shape))
        held += 2 * tensor.numel()
    yield shard


def _random(name: str, shape: torch.Size, norm: float) -> torch.Tensor:
    """Norms that change nothing, biases of zero, and small random numbers elsewhere."""
    if len(shape) == 1:
        return torch.full(shape, norm * ("norm" in name and name.endswith("weight")), dtype=torch.bfloat16)
    return (torch.randn(shape, dtype=torch.float32) * DEVIATION).bfloat16()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(base(name))
