"""The tokenizer in a GGUF file → a byte-level BPE of the tokenizers library, with its special tokens.

How the text is split before the merges decides which tokens a model has seen; each splitting is written down here under
the name that the file gives it, and an unknown name is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from deltaw.base.gguf_header import DAMAGED, Header, get, integers, strings
from deltaw.errors import BaseError

# The expressions are those of the published tokenizers; none is ever taken from a file.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip


@dataclass(frozen=True)
class _Splitting:
    """How text is cut into words before the merges, and what else the named tokenizer family does."""

    regex: str | None = None  # None: GPT-2's, which is built into ByteLevel
    digits_apart: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False  # when the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits_apart:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.regex is not None:
            steps.append(pre_tokenizers.Split(Regex(self.regex), behavior="isolated", invert=False))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.regex is None))
        return pre_tokenizers.Sequence(steps)


_SPLITTINGS = {
    "gpt-2": _Splitting(),
    "default": _Splitting(),
    "smollm": _Splitting(digits_apart=True),
    "llama-bpe": _Splitting(_WORDS % "{1,3}", ignore_merges=True, adds_bos=True),
    "qwen2": _Splitting(_WORDS % "", nfc=True),
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def _splitting(header: Header) -> _Splitting:
    model, pre = get(header, "tokenizer.ggml.model", str), get(header, "tokenizer.ggml.pre", str, "(absent)")
    if model != "gpt2" or pre not in _SPLITTINGS:
        raise BaseError(
            f"{header.path}: tokenizer {model!r} with pre-tokenizer {pre!r} cannot be converted (can be: gpt2 with "
            f"{', '.join(_SPLITTINGS)}); convert the model to a folder with transformers first"
        )
    return _SPLITTINGS[pre]


def _vocabulary(header: Header, num_rows: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, one of each per id; no more tokens than the embedding has rows, none twice."""
    tokens, types = strings(header, "tokenizer.ggml.tokens"), integers(header, "tokenizer.ggml.token_type")
    if len(tokens) != len(types) or len(tokens) > num_rows or len(set(tokens)) != len(tokens):
        raise BaseError(
            f"{header.path}: {len(tokens):,} tokens ({len(set(tokens)):,} different), {len(types):,} token types and "
            f"{num_rows:,} embedding rows do not fit together; {DAMAGED}"
        )
    return tokens, types


def _merges(header: Header, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for index, line in enumerate(strings(header, "tokenizer.ggml.merges")):
        left, space, right = line.partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise BaseError(f"{header.path}: merge {index:,} ({line!r}) is not made of two known tokens; {DAMAGED}")
        pairs.append((left, right))
    return pairs


def build_tokenizer(header: Header, num_rows: int) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its named special tokens as tokenizer_config.json holds them."""
    splitting = _splitting(header)
    tokens, types = _vocabulary(header, num_rows)
    vocabulary = {token: id for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    merges = _merges(header, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges))
    tokenizer.normalizer = normalizers.NFC() if splitting.nfc else None
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in added])
    named = _named_tokens(header, tokens)
    _frame(header, tokenizer, named, splitting.adds_bos)
    return tokenizer, named


def _named_tokens(header: Header, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: get(header, f"tokenizer.ggml.{key}_token_id", int, None) for name, key in keys.items()}
    for name, id in ids.items():
        if id is not None and id >= len(tokens):
            raise BaseError(f"{header.path}: {name} has the id {id:,}, but there are {len(tokens):,} tokens; {DAMAGED}")
    return {name: tokens[id] for name, id in ids.items() if id is not None}


def _frame(header: Header, tokenizer: Tokenizer, named: dict[str, str], adds_bos: bool) -> None:
    """Makes the tokenizer put bos before, and eos after, each text, where the file says so."""
    wanted = {"bos_token": adds_bos, "eos_token": False}
    for name in wanted:
        wanted[name] = get(header, f"tokenizer.ggml.add_{name}", bool, wanted[name]) and name in named
    if not any(wanted.values()):
        return
    bos, eos = ([named[name]] if wanted[name] else [] for name in ("bos_token", "eos_token"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A:0", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(bos + eos)],
    )
