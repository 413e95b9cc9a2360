"""Text from a base with whatever adapter is active in it. transformers decodes; deltaw only prepares and streams."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deltaw.base.forward import plain_attention
from deltaw.base.load import Base


def render_prompt(base: Base, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of a conversation up to where the next answer begins; plain text where the base has no chat template."""
    if base.tokenizer.chat_template is None:
        text, special = "".join(message["content"] for message in messages), True
    else:
        text = base.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        special = False
    tokens: list[int] = base.tokenizer(text, add_special_tokens=special)["input_ids"]
    return tokens


def end_tokens(base: Base) -> list[int]:
    """The token ids that end an answer: those of the generation config and the tokenizer."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, base.tokenizer.eos_token_id] if i is not None})


@torch.no_grad()
def generate(
    base: Base,
    messages: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's next answer as text; `on_text` receives it in pieces as it grows. Temperature 0 is greedy."""
    prompt = render_prompt(base, messages)
    streamer = None if on_text is None else _Streamer(base.tokenizer, on_text)
    ends = end_tokens(base)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    if temperature <= 0:
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    with plain_attention(base.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = torch.tensor([prompt], device=base.device)
        output = base.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            streamer=streamer,
            **sampling,
        )
    answer: str = base.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    return answer


class _Streamer:
    """Hands on text as tokens arrive, holding back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.shown = 0
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers with the prompt first, then with each token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("�"):
            self.on_text(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        """Called by transformers when the answer is complete."""
