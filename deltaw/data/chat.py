"""Rows → Examples: token ids, and one weight per token (1 trained, 0 context).

Where the answers lie is found out from the template itself (deltaw/data/answers.py). An answer is trained up to and
with its last control token (the end of turn). No marker text of any model is known here.

Text before an answer is tokenised as it will be when the model has to go on from there: where the tokens of the whole
do not begin with those of the part, the parts are tokenised one by one.

Rows are taken many at a time, because the tokenizer then works on all cores.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError

from deltaw.data.answers import Located, Locator, join_marks
from deltaw.data.encoding import MASKS, encoding_digest
from deltaw.data.example import Example
from deltaw.data.formats import Row, Weight
from deltaw.data.source import Fault
from deltaw.data.template import Renderer, Span

CHUNK_ROWS = 256
# Words that only control tokens look like: <|im_end|>, <｜User｜>, <start_of_turn>, <eos>.
_CONTROL_WORD = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|</?(?:start|end)_of_turn>|<(?:bos|eos|eot)>")


@dataclass(frozen=True)
class Encoded:
    """What became of a row: its examples, one or several where a long text is cut into pieces, and what was noticed."""

    row: Row
    examples: list[Example]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass
class _Draft:
    """A row on its way: its text, the spans of it that are trained with their weights, and the answers among them."""

    row: Row
    text: str
    spans: list[tuple[Span, float]]
    answers: list[Span]
    notes: list[tuple[str, str]] = field(default_factory=list)


class _Refused(ValueError):
    """A row that cannot be encoded; the message is the reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Encoder:
    """Turns rows into examples with one tokenizer and its chat template; a row that cannot be used becomes a Fault.

    `train_on` is "assistant" (every answer), "last" (the last one), "completion" (the completion; of a chat, the last
    answer) or "all" (every token); weights of single messages and parts scale what it chooses. Findings in `allow` do
    not make a row a Fault where it can be used all the same. `today` is the day that a template prints;
    `tokenizer_digest` names the tokenizer with its template where the caller knows it from their files.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        train_on: str = "assistant",
        allow: Iterable[str] = (),
        today: datetime.date | None = None,
        tokenizer_digest: str | None = None,
    ) -> None:
        assert max_length > 1, "a document of one token predicts nothing"
        assert train_on in MASKS, train_on
        self.tokenizer, self.max_length, self.train_on, self.allow = tokenizer, max_length, train_on, frozenset(allow)
        self.today = today
        self.tokenizer_digest = tokenizer_digest or _digest_of(tokenizer)
        self.renderer = None if tokenizer.chat_template is None else Renderer(tokenizer, today)
        self.marked = self.renderer is not None and self.renderer.marked
        decoder = tokenizer.added_tokens_decoder
        self.added = set(decoder)
        self.special = {token_id for token_id, token in decoder.items() if token.special} | set(
            tokenizer.all_special_ids
        )
        self.ends = self.special | self.added
        texts = sorted(
            (tokenizer.convert_ids_to_tokens(i) for i in self.special if i is not None), key=len, reverse=True
        )
        self._control = re.compile("|".join(map(re.escape, filter(None, texts)))) if texts else None
        self._bos = tokenizer.bos_token_id if self._puts_bos_first() else None

    def _puts_bos_first(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]

    @property
    def digest(self) -> str:
        """The name of what decides which tokens a row gives."""
        prints_day = self.renderer is not None and self.renderer.prints_the_day()
        day = self.today if prints_day else None
        return encoding_digest(self.tokenizer_digest, self.max_length, self.train_on, self.allow, day)

    def ready(self) -> Encoder:
        """Itself: an encoder that stands already (see LazyEncoder)."""
        return self

    def foreign_words(self) -> list[str]:
        """Control words that the template prints and the tokenizer does not know as one token each."""
        if self.renderer is None:
            return []
        probe = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        try:
            printed = self.renderer.text(probe) + self.renderer.text(probe[:1], answer_follows=True)
        except TemplateError:  # what it says is heard row by row
            return []
        known = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return sorted(set(_CONTROL_WORD.findall(printed)) - known)

    def encode(self, row: Row) -> list[Example] | Fault:
        """The row's examples, or why it has none."""
        (found,) = self.encode_many([row])
        return found if isinstance(found, Fault) else found.examples

    def encode_many(self, rows: Iterable[Row | Fault]) -> Iterator[Encoded | Fault]:
        """What became of each row, in order; faults among them are handed on."""
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            drafts: list[_Draft | Encoded | Fault] = [
                row if isinstance(row, Fault) else self._guard(row, self._draft, row) for row in chunk
            ]
            tokenised = iter(self._tokenise([draft for draft in drafts if isinstance(draft, _Draft)]))
            for draft in drafts:
                yield (
                    self._guard(draft.row, self._finish, draft, *next(tokenised))
                    if isinstance(draft, _Draft)
                    else draft
                )

    def _guard(self, row: Row, step: Any, *arguments: Any) -> Any:
        """What a step gives, or a Fault of the row that it refused."""
        try:
            return step(*arguments)
        except _Refused as refused:
            return Fault(row.file, row.number, str(refused), refused.code)

    # -- rows → drafts -------------------------------------------------------------------------------------------------

    def _draft(self, row: Row) -> _Draft | Encoded:
        if row.skip is not None:
            return Encoded(row, [])
        if row.tokens:
            return self._from_tokens(row)
        self._refuse_control_tokens(row)
        if row.text is not None:
            return self._from_text(row, row.text)
        if self.renderer is None:
            return self._draft_without_template(row)
        if row.messages[0]["role"] == "assistant":
            raise _Refused("wrong-shape", "its first message is an answer to nothing")
        try:
            located = self._answers(row)
        except TemplateError as error:
            called = any(message.get("tool_calls") for message in row.messages)
            hint = "; it may have no place for tool calls: use a base whose template prints them" if called else ""
            raise _Refused("template-refuses", f"the chat template refuses it ({error}){hint}") from error
        spans = self._weighted(row, located.text, list(located.spans.items()))
        notes = [*_repeated(row), *located.notes]
        if row.tools and not self._prints_tools(row, located.text):
            notes.append(("tools-missing", f"{len(row.tools)} tools are given and none is printed"))
        return _Draft(row, located.text, spans, list(located.spans.values()), notes)

    def _prints_tools(self, row: Row, text: str) -> bool:
        """Whether the tools change the print. A template that takes no calls without them does print them."""
        try:
            return self.render(row.messages) != text
        except TemplateError:
            return True

    def _refuse_control_tokens(self, row: Row) -> None:
        """A control token spelt out in a text would end or fake a turn."""
        if self._control is None or "control-tokens" in self.allow:
            return
        for position, message in enumerate(row.messages, 1):
            for text in _texts_of(message):
                if found := self._control.search(text):
                    raise _Refused("control-tokens", f"message {position} ({message['role']}) contains {found[0]!r}")
        told = json.dumps(row.tools, ensure_ascii=False) if row.tools else ""
        for name, text in (("text", row.text or ""), ("list of tools", told)):
            if found := self._control.search(text):
                raise _Refused("control-tokens", f"the {name} contains {found[0]!r}")

    def _draft_without_template(self, row: Row) -> _Draft:
        """prompt + completion + end of text, for bases that have no chat format."""
        if [message["role"] for message in row.messages] != ["user", "assistant"]:
            raise _Refused(
                "template-refuses", "the base has no chat template, so only prompt and completion, or text, can be used"
            )
        prompt = (self.tokenizer.bos_token if self._bos is not None else "") + row.messages[0]["content"]
        whole = prompt + row.messages[1]["content"] + (self.tokenizer.eos_token or "")
        span = (len(prompt), len(whole))
        return _Draft(row, whole, self._weighted(row, whole, [(1, span)]), [span])

    def _answers(self, row: Row) -> Located:
        """The conversation, and where each answer lies in it, by the number of its message."""
        assert self.renderer is not None
        messages = self._as_the_template_takes_them(row)
        located = Locator(self.renderer, messages, row.tools, self._control).locate()
        if self.marked:
            located = join_marks(located, messages, *self.renderer.text_and_marks(messages, row.tools))
        wanted = told_apart = self._wanted(row)
        if self.train_on == "all":  # of the others it need not be known where they stand, but that they do
            told_apart = {position for position, weight in enumerate(self._given(row)) if weight is not None}
        faults = [
            fault
            for position, fault in located.faults.items()
            if position in (wanted if fault[0] == "answer-missing" else told_apart)
        ]
        if faults:
            raise _Refused(*faults[0])
        return located

    def _as_the_template_takes_them(self, row: Row) -> tuple[dict[str, Any], ...]:
        """`developer` is `system` to a template that has not heard of it."""
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        if any("developer" in text for text in texts):
            return row.messages
        return tuple({**m, "role": "system"} if m["role"] == "developer" else m for m in row.messages)

    def _wanted(self, row: Row) -> set[int]:
        """The numbers of the messages that are trained at all."""
        positions = [position for position, message in enumerate(row.messages) if message["role"] == "assistant"]
        given = row.weights or (None,) * len(row.messages)
        if self.train_on == "last" or (self.train_on == "completion" and not row.context):
            positions = positions[-1:]
        return {position for position in positions if given[position] != 0}

    def _given(self, row: Row) -> Sequence[Weight]:
        """The weight that each message has of its own; under "all", a context has its 0 from nobody but its format."""
        given = row.weights or (None,) * len(row.messages)
        return (*(None for _ in given[: row.context]), *given[row.context :]) if self.train_on == "all" else given

    def _weighted(self, row: Row, text: str, answers: list[tuple[int, Span]]) -> list[tuple[Span, float]]:
        """The trained spans of a conversation with their weights."""
        given = self._given(row)
        if self.train_on == "all":
            asked = [(position, span) for position, span in answers if given[position] is not None]
            return _around(len(text), _spans_of(text, asked, given))
        wanted = self._wanted(row)
        spans = _spans_of(text, [(position, span) for position, span in answers if position in wanted], given)
        if not any(weight for _, weight in spans):
            raise _Refused("nothing-trained", "none of its answers is to be trained")
        return spans

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), *, answer_follows: bool = False
    ) -> str:
        """The conversation as the model reads it; with `answer_follows`, up to where its next answer begins."""
        assert self.renderer is not None
        taken = self._as_the_template_takes_them(Row("", 0, tuple(messages)))
        return self.renderer.text(taken, tools, answer_follows=answer_follows)

    # -- drafts → tokens -----------------------------------------------------------------------------------------------

    def _tokenise(self, drafts: list[_Draft]) -> list[tuple[list[int], list[int | None]]]:
        """(tokens, number of tokens before each border of its spans) of each draft; a border is None within a token."""
        encoded = self._ids_and_starts([draft.text for draft in drafts])
        self._notice_changed_texts(drafts, [tokens for tokens, _ in encoded])
        heads: list[str] = []
        asked: list[list[tuple[int, int] | None]] = []
        for draft, (tokens, starts) in zip(drafts, encoded, strict=True):
            asked.append(self._ask(draft, tokens, starts, heads))
        head_ids = self._ids(heads)
        return [
            (tokens, [self._place(tokens, request, head_ids) for request in requests])
            for (tokens, _), requests in zip(encoded, asked, strict=True)
        ]

    def _notice_changed_texts(self, drafts: list[_Draft], ids: list[list[int]]) -> None:
        """A tokenizer that normalises or drops text shows when its tokens are turned back; spaces it may move."""
        if not self.tokenizer.is_fast:
            return
        for draft, back in zip(
            drafts, self.tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False), strict=True
        ):
            if back != draft.text and (known := "".join(draft.text.split())) != (got := "".join(back.split())):
                place = next((i for i, (a, b) in enumerate(zip(known, got, strict=False)) if a != b), len(got))
                shown = (
                    f"{known[max(0, place - 5) : place + 15]!r} comes back as {got[max(0, place - 5) : place + 15]!r}"
                )
                draft.notes.append(("not-round-trip", shown))

    def _ask(
        self, draft: _Draft, tokens: list[int], starts: list[int], heads: list[str]
    ) -> list[tuple[int, int] | None]:
        """For each border: (number of the token to begin at, number of its head in `heads`), None at the text's end.

        The text before a border is tokenised from its last added token on: these tokens are cut out of a text first, so
        that nothing before one depends on what follows it.
        """
        added = [(start, index) for index, start in enumerate(starts) if tokens[index] in self.added]
        requests: list[tuple[int, int] | None] = []
        for span in _borders(draft):
            for border in span:
                if border == len(draft.text):
                    requests.append(None)
                    continue
                last = bisect_left(added, (border, 0))
                start, index = added[last - 1] if last else (0, 0)
                requests.append((index, len(heads)))
                heads.append(draft.text[start:border])
        return requests

    def _place(self, tokens: list[int], request: tuple[int, int] | None, heads: list[list[int]]) -> int | None:
        """The number of tokens before a border; None where the text before it, by itself, has other tokens."""
        if request is None:
            return len(tokens)
        index, head = request[0], heads[request[1]]
        return index + len(head) if tokens[index : index + len(head)] == head else None

    def _ids_and_starts(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """(token ids, first character of each) of every text."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [(ids, []) for ids in self._ids(texts)]
        found = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        return [
            (ids, [start for start, _ in offsets])
            for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return ids

    def _text_ids(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        if self.tokenizer.eos_token_id is not None and tokens[-1:] != [self.tokenizer.eos_token_id]:
            tokens = [*tokens, self.tokenizer.eos_token_id]
        return tokens

    # -- tokens → examples ---------------------------------------------------------------------------------------------

    def _finish(self, draft: _Draft, tokens: list[int], places: list[int | None]) -> Encoded:
        if None in places:
            tokens, places = self._piecewise(draft)
        spans = self._trained(draft, tokens, places)
        weights = np.zeros(len(tokens), np.float32)
        for (start, stop), (_, weight) in zip(spans, draft.spans, strict=True):
            weights[start:stop] = weight
        return self._fit(draft.row, np.asarray(tokens, np.int32), weights, self._noticed(draft, tokens, spans))

    def _fit(self, row: Row, tokens: np.ndarray, weights: np.ndarray, notes: list[tuple[str, str]]) -> Encoded:
        """One example of at most `max_length` tokens."""
        if not weights[1:].any():
            raise _Refused("nothing-trained", "the chat template leaves nothing of its answers to train")
        if len(tokens) <= self.max_length:
            return Encoded(row, [Example(tokens, weights, row.number)], tuple(notes))
        lost = np.count_nonzero(weights[self.max_length :])
        part = Example(tokens[: self.max_length], weights[: self.max_length], row.number, cut=True)
        if not part.weights[1:].any():
            raise _Refused(
                "too-long",
                f"it has {len(tokens):,} tokens, and no trained token is left within max-length {self.max_length}",
            )
        if lost:
            notes = [*notes, ("answer-cut", f"{lost:,} trained tokens of {len(tokens):,} lie behind max-length")]
        return Encoded(row, [part], tuple(notes))

    def _piecewise(self, draft: _Draft) -> tuple[list[int], list[int | None]]:
        """The tokens and borders with every span, and what lies between them, tokenised by itself."""
        tokens: list[int] = []
        places: list[int | None] = []
        borders = [0, *(border for span in _borders(draft) for border in span), len(draft.text)]
        for ids in self._ids([draft.text[start:stop] for start, stop in pairwise(borders)]):
            places.append(len(tokens))
            tokens += ids
        if self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False) != draft.text:
            raise _Refused(
                "mask-unclear", "an answer begins or ends within a token, and cutting there changes the text"
            )
        return tokens, places[1:]

    def _trained(self, draft: _Draft, tokens: Sequence[int], places: Sequence[int | None]) -> list[Span]:
        """The spans in tokens; an answer ends with its last control token, not with what stands behind that."""
        answer_ends = {stop for _, stop in draft.answers}
        found: list[Span] = []
        for ((_, stop), _), first, last in zip(draft.spans, places[::2], places[1::2], strict=True):
            assert first is not None and last is not None
            ends = (
                [place for place in range(first, last) if tokens[place] in self.special] if stop in answer_ends else []
            )
            found.append((first, ends[-1] + 1 if ends and self.train_on != "all" else last))
        return found

    def _noticed(self, draft: _Draft, tokens: Sequence[int], spans: Sequence[Span] = ()) -> list[tuple[str, str]]:
        """What is worth saying about a row that can be used."""
        notes = list(draft.notes)
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in tokens:
            notes.append(
                ("unknown-tokens", f"{list(tokens).count(self.tokenizer.unk_token_id)} of {len(tokens)} tokens")
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(tokens[:2]) == [bos, bos]:
            notes.append(("double-bos", "the template and the text each begin with it"))
        elif self._bos is not None and tokens[0] != self._bos:
            notes.append(("missing-bos", f"it begins with token {tokens[0]}"))
        answer_ends = set() if self.train_on == "all" else {stop for _, stop in draft.answers}
        for ((_, border), weight), (first, stop) in zip(draft.spans, spans, strict=True):
            if border in answer_ends and weight and stop > first and tokens[stop - 1] not in self.ends:
                notes.append(("end-of-turn", f"an answer ends in {self.tokenizer.decode(tokens[stop - 1 : stop])!r}"))
                break
        return notes

    def _pieces(self, tokens: list[int], row: int) -> list[Example]:
        """A text in pieces that overlap by one token: each token but the first is predicted once."""
        if len(tokens) < 2:
            raise _Refused("nothing-trained", "it has a single token, so there is nothing to predict")
        all_tokens = np.asarray(tokens, np.int32)
        starts = range(0, len(tokens) - 1, self.max_length - 1)
        pieces = [all_tokens[start : start + self.max_length] for start in starts]
        return [Example(piece, np.ones(len(piece), np.float32), row) for piece in pieces]

    def _from_text(self, row: Row, text: str) -> Encoded:
        """All of a text, and its end."""
        tokens = self._text_ids(text)
        pieces = self._pieces(tokens, row.number)
        return Encoded(row, pieces, tuple(self._noticed(_Draft(row, text, [], []), tokens)))

    def _from_tokens(self, row: Row) -> Encoded:
        """A row that was tokenised elsewhere."""
        most = len(self.tokenizer)
        if wrong := [token for token in row.tokens if not 0 <= token < most]:
            raise _Refused("wrong-shape", f"token {wrong[0]} is outside the vocabulary of {most:,}")
        weights = np.asarray([label != -100 for label in row.labels], np.float32)
        tokens = np.asarray(row.tokens, np.int32)
        if not weights[1:].any():
            raise _Refused("nothing-trained", "all of its labels are -100")
        notes = self._noticed(_Draft(row, "", [], []), tokens.tolist())
        return self._fit(row, tokens, weights, notes)


def _borders(draft: _Draft) -> list[Span]:
    return [span for span, _ in draft.spans]


def _part_spans(
    text: str, span: Span, parts: Sequence[tuple[str, float | None]], position: int
) -> list[tuple[Span, float]]:
    """The parts of one answer with their weights; what the template adds behind them belongs to the last part."""
    content = "".join(part for part, _ in parts)
    start = text.find(content, *span)
    if start < 0 or text.find(content, start + 1, span[1]) >= 0:
        raise _Refused(
            "mask-unclear", f"message {position + 1} has weights for its parts, but the template changes its text"
        )
    spans: list[tuple[Span, float]] = []
    for number, (part, weight) in enumerate(parts):
        first = span[0] if number == 0 else start
        start = (start if number else text.find(content, *span)) + len(part)
        last = span[1] if number == len(parts) - 1 else start
        spans.append(((first, last), 1.0 if weight is None else weight))
    return spans


def _spans_of(text: str, answers: Sequence[tuple[int, Span]], given: Sequence[Weight]) -> list[tuple[Span, float]]:
    """The spans of these answers, by the numbers of their messages, with the weights that are given, or 1."""
    spans: list[tuple[Span, float]] = []
    for position, span in answers:
        weight = given[position]
        if isinstance(weight, tuple):
            spans += _part_spans(text, span, weight, position)
        else:
            spans.append((span, 1.0 if weight is None else weight))
    return spans


def _around(length: int, spans: Sequence[tuple[Span, float]]) -> list[tuple[Span, float]]:
    """All of a text: these spans, and what lies between them with weight 1."""
    found: list[tuple[Span, float]] = []
    end = 0
    for (start, stop), weight in sorted(spans):
        found += [((end, start), 1.0), ((start, stop), weight)]
        end = stop
    return [(span, weight) for span, weight in [*found, ((end, length), 1.0)] if span[0] < span[1]]


def _texts_of(message: dict[str, Any]) -> Iterator[str]:
    for key in ("content", "reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str):
            yield message[key]
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], ensure_ascii=False)


def _repeated(row: Row) -> list[tuple[str, str]]:
    for number, (first, second) in enumerate(pairwise(row.messages), 1):
        if first["role"] == second["role"] and first["role"] in ("user", "assistant"):
            return [("repeated-role", f"messages {number} and {number + 1} are both of the {first['role']}")]
    return []


def _digest_of(tokenizer: Any) -> str:
    """sha256 over a tokenizer that is in no folder, and its template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = repr(tokenizer) if backend is None else backend.to_str()
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, text]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
