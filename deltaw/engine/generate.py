"""Text from a base with whatever adapter is active in it. transformers decodes; deltaw only prepares and streams."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from deltaw.base.forward import plain_attention
from deltaw.base.load import Base
from deltaw.base.stream import follow_modules
from deltaw.data.chat import Encoder
from deltaw.data.formats import Row
from deltaw.data.source import Fault
from deltaw.errors import DataError, UsageError

Messages = Sequence[dict[str, Any]]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def render_prompt(base: Base, messages: Messages, tools: Sequence[Any] = ()) -> list[int]:
    """Token ids of a conversation up to where the next answer begins; plain text where the base has no chat template.

    Raises DataError when the template refuses the conversation, or there is nothing in it.
    """
    tokenizer = base.tokenizer
    if tokenizer.chat_template is None:
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise DataError("A message has no text, and the base has no chat template that could say it otherwise.")
        text = "".join(message["content"] for message in messages)
        tokens: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
        tokens = tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens
    else:
        encoder = Encoder(tokenizer, base.context_tokens)
        try:
            text = encoder.render(messages, tools, answer_follows=True)
        except TemplateError as error:
            raise DataError(f"The chat template refuses this conversation: {error}") from error
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise DataError("The prompt is empty.")
    return tokens


def end_tokens(base: Base) -> list[int]:
    """The token ids that end an answer: those of the generation config, of the tokenizer, and of the chat template."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, base.tokenizer.eos_token_id, _end_of_turn(base)] if i is not None})


def _end_of_turn(base: Base) -> int | None:
    """The special token behind an answer, which training teaches: some bases name only the end of text elsewhere."""
    if base.tokenizer.chat_template is None:
        return None
    encoder = Encoder(base.tokenizer, base.context_tokens)
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    encoded = encoder.encode(Row("", 1, chat))
    if isinstance(encoded, Fault):
        return None
    trained = encoded[0].tokens[encoded[0].weights > 0].tolist()
    text = next((place for place, token in enumerate(trained) if "b" in base.tokenizer.decode([token])), len(trained))
    # Of several behind it, as of Phi-3, the first ends the turn.
    return next((token for token in trained[text + 1 :] if token in encoder.special), None)


def generate(
    base: Base,
    messages: Messages,
    *,
    tools: Sequence[Any] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    on_cut: Callable[[int], None] | None = None,
) -> str:
    """The model's next answer as text; `on_text` receives it in pieces as it grows.

    `on_cut` hears the number of tokens of an answer that was not at its end when it had as many as it may have.

    Temperature 0 takes the most likely token each time, whatever the base's generation config wishes; sampling follows
    that config's other settings. An answer ends with the base's context at the latest. The caller's random numbers stay
    untouched. Raises UsageError for a length or a temperature without meaning.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature must be a finite number from 0, not {temperature}.")
    prompt = render_prompt(base, messages, tools)
    streamer = None if on_text is None else _Streamer(base.tokenizer, on_text)
    answer_N = continuation(base, prompt, max_new_tokens, temperature, seed, streamer)
    if on_cut is not None and int(answer_N[-1]) not in end_tokens(base):
        on_cut(len(answer_N))
    text: str = base.tokenizer.decode(answer_N, skip_special_tokens=True)
    return text


@torch.no_grad()
def continuation(
    base: Base,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: _Streamer | None = None,
) -> Tensor:
    """The token ids that follow a prompt's, as `generate` takes them, with the one that ends them, if they have an end.

    Raises DataError for a prompt as long as the base's context.
    """
    room = base.context_tokens - len(prompt)
    if room < 1:
        raise DataError(f"The prompt has {len(prompt):,} tokens; this base was made for {base.context_tokens:,}.")
    ends = end_tokens(base)
    tokens = torch.tensor([prompt], device=base.device)
    devices = [base.device] if base.device.type == "cuda" else []
    with (
        contextlib.ExitStack() as ended,
        plain_attention(base.model),
        torch.random.fork_rng(devices),
        warnings.catch_warnings(),
    ):
        if base.pager is not None:
            for handle in follow_modules(base.model):
                ended.callback(handle.remove)
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        output = base.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=min(max_new_tokens, room),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            streamer=streamer,
            **_sampling(temperature),
        )
    answer_N: Tensor = output[0, len(prompt) :]
    return answer_N


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    unused = dict.fromkeys(("temperature", "top_p", "top_k"))
    return {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, **unused}


class _Streamer:
    """Hands on text as tokens arrive, holding back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.shown = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Called by transformers with the prompt first, then with each token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith(UNFINISHED):
            self._show(text)

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        """Called by transformers when the answer is complete: what was held back is all there is."""
        self._show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
