"""Small models made in the tests: random weights, real architectures of transformers, a real byte-level tokenizer."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaw.adapter import Factors, LoraSpec, choose, inject, new_adapter
from deltaw.base import forward
from deltaw.base.load import Base
from deltaw.base.proof import prove
from deltaw.data.chat import Encoder
from deltaw.data.example import Example
from deltaw.data.formats import Row
from deltaw.data.pack import flat_batch
from deltaw.data.store import TokenStore
from deltaw.engine.objective import batch_loss, head_factors, score_batch

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
    "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "olmo2": lambda: transformers.Olmo2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "phi3": lambda: transformers.Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
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
    return Base("tiny", Path(), model, byte_tokenizer(template), *prove(model))


def chat_rows(pairs: list[tuple[str, str]]) -> list[Row]:
    """One chat of question and answer for each pair."""
    chats = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in pairs]
    return [Row("pairs", number, chat) for number, chat in enumerate(chats, 1)]


def chat_store(stem: Path, pairs: list[tuple[str, str]]) -> TokenStore:
    """These questions and answers encoded with the byte tokenizer, in files at `stem`."""
    encoder = Encoder(byte_tokenizer(), 256)
    return TokenStore.write(stem, [example for row in chat_rows(pairs) for example in encoder.encode(row)])


# -- models far from uniform, for comparisons ------------------------------------------------------------------------

GENERAL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
MORE = {
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=0.7, final_logit_softcapping=1.5
    ),
    "phi3-long": lambda: transformers.Phi3Config(
        **SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=20
    ),
    "granite": lambda: transformers.GraniteConfig(
        **{name: value for name, value in SMALL.items() if name != "head_dim"}, logits_scaling=4.0
    ),
    "llama4": lambda: transformers.Llama4TextConfig(**SMALL, intermediate_size_mlp=48, attention_chunk_size=64),
    "lfm2": lambda: transformers.Lfm2Config(**SMALL, block_dim=32, layer_types=["conv", "full_attention"]),
    "mamba": lambda: transformers.MambaConfig(**GENERAL, state_size=4),
    "bloom": lambda: transformers.BloomConfig(**GENERAL),
    "rwkv": lambda: transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SMALL,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
    ),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
}


def lively_model(kind, **changes):
    """A small model whose weights are ten times larger than usual, so that attention is far from uniform."""
    torch.manual_seed(1)
    config = {**CONFIGS, **MORE}[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model


def some_documents(lengths):
    """Documents of random bytes."""
    return [torch.randint(3, VOCABULARY, (length,)) for length in lengths]


def own_losses(model, document):
    """What transformers' own forward says about one document."""
    with forward.plain_attention(model):
        logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), document[1:], reduction="none")


def flat_row(documents):
    """(tokens, positions, bounds) of documents laid end to end."""
    bounds = tuple(accumulate((len(d) for d in documents), initial=0))
    return torch.cat(documents), torch.cat([torch.arange(len(d)) for d in documents]), bounds


# -- passes over a base ---------------------------------------------------------------------------------------------------


def some_batch(seed=0, lengths=(40, 9, 130)):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 200, (n,), generator=generator).int().numpy() for n in lengths]
    return flat_batch([Example(row, (row % 3 > 0).astype("float32")) for row in rows])


def slopes(base, **options):
    """Loss, gradients of a random adapter, and the scores of an evaluation between two passes."""
    spec = LoraSpec(rank=3, alpha=6, **options)
    adapter = new_adapter(choose(base.model, spec), spec, 0)
    generator = torch.Generator().manual_seed(0)
    adapter = adapter.with_factors(
        {
            name: Factors(f.A, 0.05 * torch.randn(f.B.shape, generator=generator), f.magnitude)
            for name, f in adapter.factors.items()
        }
    )
    found = []
    with inject(base.model, adapter, trainable=True, dtype=torch.float32) as injection:
        injection.train(True)
        for _ in range(2):
            loss = batch_loss(base, some_batch(), head_factors(base, injection))
            named = {f"{part} of {name}": tensor for name, part, tensor in injection.trained()}
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            found += [loss.detach(), *(grad for grad in grads if grad is not None)]
            found.append(score_batch(base, some_batch(1)).losses_N)
    return found
