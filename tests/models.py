"""Small models made in the tests: random weights, real architectures of transformers, a real byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaw.base import forward
from deltaw.base.load import Base
from deltaw.data.chat import Encoder
from deltaw.data.formats import Row
from deltaw.data.store import TokenStore

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=6),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=8),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}, rotary_pct=0.25),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def small_model(kind: str, seed: int = 0) -> Any:
    """A small causal language model of this architecture with random weights in fp32, in eval mode."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()


def byte_tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, three special tokens in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def save_base(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A complete base folder as a user has it: safetensors, config, tokenizer, chat template."""
    small_model(kind, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def small_base(kind: str = "llama", seed: int = 0, template: str | None = CHAT_TEMPLATE) -> Base:
    """A base that was never on disk, frozen, with its fast path proved."""
    model = small_model(kind, seed).requires_grad_(False)
    return Base("tiny", Path(), model, byte_tokenizer(template), forward.prove(model))


def chat_rows(pairs: list[tuple[str, str]]) -> list[Row]:
    """One chat of question and answer for each pair."""
    chats = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in pairs]
    return [Row("pairs", number, chat) for number, chat in enumerate(chats, 1)]


def chat_store(stem: Path, pairs: list[tuple[str, str]]) -> TokenStore:
    """These questions and answers encoded with the byte tokenizer, in files at `stem`."""
    encoder = Encoder(byte_tokenizer(), 256)
    return TokenStore.write(stem, [example for row in chat_rows(pairs) for example in encoder.encode(row)])
