"""Records → Rows: a format is recognised by its columns and said out loud; what a row means is the same for all.

A row ends as messages with a weight for each, as a text, or as tokens with labels. Formats in which answers are judged
(preference pairs, unpaired ones) are read for supervised training: the chosen or good answer is trained, the rejected
one checked and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltaw.data.source import Fault, Record, Source, parse_source, read_file, read_source
from deltaw.errors import DataError, bullet_list

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}
_CONTROL_KEYS = ("weight", "train")
Parts = tuple[tuple[str, float | None], ...]
Weight = float | Parts | None


@dataclass(frozen=True)
class Row:
    """One usable row: `messages` for a chat, `text`, or `tokens` with `labels`; `file` and `number` say where it stood.

    `weights` holds one entry a message: None (the mask decides), a number for the whole message, or its parts with a
    number or None each. Empty means None for all. The first `context` messages are a prompt, which is not trained
    whatever it holds. `rejected` is the judged-worse answer of a pair. `skip` says why a
    row is read but not trained, such as an answer labelled as bad.
    """

    file: str
    number: int
    messages: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    tools: tuple[Any, ...] = field(default=())
    weights: tuple[Weight, ...] = field(default=())
    format: str = field(default="", compare=False)
    rejected: tuple[dict[str, Any], ...] = ()
    tokens: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    skip: str | None = None
    context: int = field(default=0, compare=False)

    @property
    def answer(self) -> str | None:
        """The text of the last assistant turn, where there is one."""
        return next((m.get("content") for m in reversed(self.messages) if m["role"] == "assistant"), None)


class _Unusable(ValueError):
    """A row that cannot be used; the message is the reason."""

    def __init__(self, reason: str, code: str = "wrong-shape") -> None:
        super().__init__(reason)
        self.code = code


def parse_sources(data: str | Path | Iterable[str | Path], columns: str | Iterable[str] = ()) -> list[Source]:
    """The Sources that settings name, one or several; `columns` are "canonical=yours" for all. Lists every fault."""
    pairs, faults = [], []
    columns = [columns] if isinstance(columns, str) else columns
    texts = [data] if isinstance(data, str | Path) else data
    for entry in columns:
        canonical, equals, name = entry.partition("=")
        if not equals or not name or canonical not in COLUMNS:
            faults.append(f"--columns {entry}: write canonical=yours, canonical being one of {', '.join(COLUMNS)}")
        else:
            pairs.append((canonical, name))
    sources = []
    for text in texts:
        try:
            sources.append(parse_source(str(text), pairs, COLUMNS))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("The data cannot be understood:\n" + bullet_list(faults))
    return sources


def read_rows(sources: Sequence[Source | str | Path], *, to_answer: bool = False) -> Iterator[Row | Fault]:
    """Every row of the sources in order, usable or not. Raises DataError for a file that cannot be opened at all.

    Of rows `to_answer`, the last answer may be missing.
    """
    for source in sources:
        if isinstance(source, Path):
            yield from (to_row(record, to_answer=to_answer) for record in read_file(source))
        else:
            known = parse_source(source, known=COLUMNS) if isinstance(source, str) else source
            yield from (to_row(record, known.columns, to_answer=to_answer) for record in read_source(known))


def to_row(record: Record | Fault, columns: Iterable[tuple[str, str]] = (), *, to_answer: bool = False) -> Row | Fault:
    """The row of a record, or why it cannot be used."""
    if isinstance(record, Fault):
        return record
    try:
        given = _renamed(record.value, columns)
        value = _plain(given) if record.typed else given
        open_ended = to_answer and _answered(value)
        if open_ended:
            given = value = open_ended
        name = format_of(value)
        if record.typed:
            _require_whole(format_of(given), name, value)
        if name is None:
            raise _Unusable(
                f"it has none of {_KNOWN}; its keys are {sorted(value)[:8]}",
                "unknown-format",
            )
        parts = _labelled(value, _with_system(value, _FORMATS[name][1](value)))
    except _Unusable as error:
        return Fault(record.file, record.number, str(error), error.code)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return Fault(
            record.file, record.number, f"its {type(error).__name__} cannot be understood: {error}", "wrong-shape"
        )
    row = Row(record.file, record.number, format=name, **parts)
    return replace(row, messages=row.messages[:-1], weights=row.weights[:-1]) if open_ended else row


def _answered(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """The value with an answer where its last one is missing, as every format needs one; None where none is."""
    if "chosen" in value:
        return None
    for key in ("messages", "conversations"):
        turns = value.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = turns[-1]
            if _SHAREGPT.get(str(last.get("role", last.get("from")))) in ("assistant", "function_call"):
                return None
            said = {"from": "gpt", "value": "."} if "from" in last else {"role": "assistant", "content": "."}
            return {**value, key: [*turns, said]}
    for asked, answer in (("prompt", "completion"), ("instruction", "output")):
        if asked in value and not value.get(answer):
            return {**value, answer: "."}
    return None


def _require_whole(of_columns: str | None, of_cells: str | None, filled: Mapping[str, Any]) -> None:
    """Raises where a typed row has some of what the format of its columns needs, and would be taken for another one."""
    if of_columns is None or of_columns == of_cells:
        return
    needed = _FORMATS[of_columns][0]
    empty = [column for column in needed if column not in filled]
    if empty and len(empty) < len(needed):
        raise _Unusable(f"{' and '.join(empty)} is empty, which {of_columns} needs", "empty-answer")


def _with_system(value: Mapping[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """A system prompt in a column of its own as the first message."""
    system = value.get("system")
    if "messages" not in parts or not system:
        return parts
    if not isinstance(system, str):
        raise _Unusable(f"system must be text, not {type(system).__name__}")
    first = parts["messages"][0]
    if first["role"] == "system":
        if first["content"] == system:
            return parts
        raise _Unusable("its system column and its first message say different things")
    weights, context = parts.get("weights") or (), parts.get("context", 0)
    return {
        **parts,
        "messages": ({"role": "system", "content": system}, *parts["messages"]),
        "weights": ((0.0 if context else None), *weights) if weights else (),
        "context": context + 1 if context else 0,
    }


def _labelled(value: Mapping[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Left out where the whole conversation is labelled as bad."""
    if parts.get("skip") is not None or "messages" not in parts:
        return parts
    if value.get("kto_tag") is not None:
        return {**parts, "skip": _skip(value["kto_tag"])}
    if "messages" in value and isinstance(value.get("label"), bool):
        return {**parts, "skip": _skip(value["label"])}
    return parts


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A typed record without the keys that its schema added: nulls go, JSON in a cell is opened where lists belong.

    Where a text may stand as well, only a list of messages is opened: an answer may be JSON itself.
    """
    filled = {key: _without_nulls(item) for key, item in value.items() if item is not None}
    for key in _LISTS & filled.keys():
        if isinstance(filled[key], str) and filled[key].lstrip().startswith(("[", "{")):
            try:
                opened = json.loads(filled[key])
            except ValueError as error:
                if key in _TEXTS_OR_LISTS:
                    continue
                raise _Unusable(f"{key} is not valid JSON ({error})") from error
            turns = "conversations" in filled and _are_turns(opened)  # elsewhere an answer that looks so is one
            if key not in _TEXTS_OR_LISTS or _are_messages(opened) or turns:
                filled[key] = opened
    for key in ("label", "kto_tag"):
        if isinstance(filled.get(key), str) and filled[key].lower() in ("true", "false"):
            filled[key] = filled[key].lower() == "true"
    return filled


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _are_turns(value: Any) -> bool:
    """Of ShareGPT; one may stand alone."""
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _renamed(value: Mapping[str, Any], columns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    value = dict(value)
    for canonical, name in columns:
        if name not in value and canonical in _REQUIRED:
            raise _Unusable(f"it has no column {name!r}, which is to be read as {canonical}")
        if name in value:
            value[canonical] = value.pop(name)
    return value


# -- formats -----------------------------------------------------------------------------------------------------------


def _chat(value: Mapping[str, Any]) -> dict[str, Any]:
    messages, weights = _messages(value["messages"])
    return {"messages": messages, "weights": weights, "tools": _tools(value)}


def _sharegpt(value: Mapping[str, Any]) -> dict[str, Any]:
    messages = _sharegpt_turns(value["conversations"])
    if value.get("chosen") is not None and value.get("rejected") is not None:
        answers = {key: _sharegpt_answer(value[key]) for key in ("chosen", "rejected")}
        return _preference({**value, "prompt": messages, **answers})
    checked, weights = _messages(messages)
    return {"messages": checked, "weights": weights, "tools": _tools(value)}


def _sharegpt_turns(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise _Unusable("conversations must be a list that is not empty")
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return list(turns)
    return [_sharegpt_turn(position, turn) for position, turn in enumerate(turns, 1)]


def _sharegpt_answer(answer: Any) -> list[dict[str, Any]]:
    """The chosen or the rejected answer of a pair: one turn, several, or its text."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return _sharegpt_turns(answer if isinstance(answer, list) else [answer])


def _sharegpt_turn(position: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or turn.get("from") not in _SHAREGPT:
        speaker = turn.get("from") if isinstance(turn, dict) else turn
        raise _Unusable(f"turn {position} is from {speaker!r}; known are {', '.join(_SHAREGPT)}", "wrong-role")
    role, text = _SHAREGPT[turn["from"]], turn.get("value")
    control = {key: turn[key] for key in _CONTROL_KEYS if key in turn}
    if role != "function_call":
        return {"role": role, "content": text, **control}
    try:
        calls = json.loads(text or "")
        calls = calls if isinstance(calls, list) else [calls]
        called = [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    except (TypeError, ValueError, KeyError) as error:
        raise _Unusable(f'turn {position} (function_call) must be JSON with "name" and "arguments"') from error
    return {"role": "assistant", "tool_calls": called, **control}


def _alpaca(value: Mapping[str, Any]) -> dict[str, Any]:
    _require_texts(value, "instruction", "output")
    messages = []
    for pair in value.get("history") or []:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise _Unusable("history must be a list of [question, answer]")
        messages += _pair(*pair)
    asked = "\n".join(part for part in (value["instruction"], value.get("input")) if part)
    checked, weights = _messages([*messages, *_pair(asked, value["output"])])
    return {"messages": checked, "weights": weights}


def _completion(value: Mapping[str, Any]) -> dict[str, Any]:
    return _joined(value["prompt"], value["completion"], value)


def _unpaired(value: Mapping[str, Any]) -> dict[str, Any]:
    return {**_joined(value["prompt"], value["completion"], value), "skip": _skip(value["label"])}


def _skip(label: Any) -> str | None:
    if not isinstance(label, bool):
        raise _Unusable(f"the label must be true or false, not {label!r}")
    return None if label else "its answer is labelled as bad"


def _joined(prompt: Any, completion: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt that is context and a completion whose answers are trained."""
    if isinstance(prompt, str) and isinstance(completion, str):
        messages, weights = _messages(_pair(prompt, completion))
        return {"messages": messages, "weights": weights, "tools": _tools(value), "context": 1}
    if not isinstance(prompt, str | list) or not isinstance(completion, str | list):
        raise _Unusable("prompt and completion must be strings or lists of messages")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    behind = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    messages, weights = _messages([*before, *behind])
    if not any(message["role"] == "assistant" for message in messages[len(before) :]):
        raise _Unusable(
            "the completion holds no message of the assistant, so nothing would be trained", "nothing-trained"
        )
    answered = weights[len(before) :] or (None,) * len(behind)
    weights = (*(0.0 for _ in before), *answered)
    return {"messages": messages, "weights": weights, "tools": _tools(value), "context": len(before)}


def _preference(value: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen answer as a completion, the rejected one beside it; without a prompt, their common beginning is it."""
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise _Unusable("chosen and rejected must both be strings or both be lists of messages")
    if chosen == rejected:
        raise _Unusable("chosen and rejected are equal", "chosen-equals-rejected")
    if isinstance(chosen, str):
        return _text_pair(prompt, chosen, rejected, value)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    if before and chosen[: len(before)] == before:  # the prompt is given, and repeated in both
        chosen = chosen[len(before) :]
        rejected = rejected[len(before) :] if rejected[: len(before)] == before else rejected
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if before and chosen[:common][-len(before) :] == before:  # repeated in both, behind what the system says
        before = []
    before, chosen, rejected = [*before, *chosen[:common]], chosen[common:], rejected[common:]
    _messages(rejected)
    if not before or any(_role(answer[:1]) != "assistant" for answer in (chosen, rejected)):
        raise _Unusable("the prompts of chosen and rejected differ", "prompts-differ")
    return {**_joined(before, chosen, value), "rejected": tuple(rejected)}


def _text_pair(prompt: Any, chosen: str, rejected: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(prompt, str | list):
        raise _Unusable("chosen and rejected are texts, so a prompt is needed")
    if not rejected.strip():
        raise _Unusable("the rejected answer is empty", "empty-answer")
    return {**_joined(prompt, chosen, value), "rejected": ({"role": "assistant", "content": rejected},)}


def _role(messages: Sequence[Any]) -> Any:
    return messages[0].get("role") if messages and isinstance(messages[0], dict) else None


def _tokenised(value: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids with labels (-100 untrained), or a mask of 0 and 1; what `attention_mask` hides is padding and goes."""
    tokens, count = value["input_ids"], len(value["input_ids"])
    named = next((key for key in ("labels", "assistant_masks", "completion_mask") if key in value), None)
    attended = value.get("attention_mask", [1] * count)
    labels = tokens if named is None else value[named]
    for name, numbers in (("input_ids", tokens), (named or "labels", labels), ("attention_mask", attended)):
        if not isinstance(numbers, list) or len(numbers) != count or not all(type(n) is int for n in numbers):
            raise _Unusable(f"{name} must be a list of {count} whole numbers, as many as input_ids")
    if named not in (None, "labels"):
        labels = [token if on else -100 for token, on in zip(tokens, labels, strict=True)]
    kept = [(t, label) for t, label, on in zip(tokens, labels, attended, strict=True) if on]
    wrong = next((i for i, (t, label) in enumerate(kept) if label not in (t, -100)), None)
    if wrong is not None:
        token, label = kept[wrong]
        raise _Unusable(f"label {wrong + 1} is {label}, neither -100 nor its token {token} (labels are not shifted)")
    if not kept:
        raise _Unusable("it holds no tokens")
    ids, marks = zip(*kept, strict=True)
    return {"tokens": ids, "labels": marks}


def _text(value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value["text"], str) or not value["text"].strip():
        raise _Unusable("text must be a string that is not empty")
    return {"text": value["text"]}


# Checked in this order: the first whose columns are all there.
_FORMATS: dict[str, tuple[tuple[str, ...], Any]] = {
    "chat": (("messages",), _chat),
    "ShareGPT": (("conversations",), _sharegpt),
    "preference pairs": (("chosen", "rejected"), _preference),
    "unpaired preference": (("prompt", "completion", "label"), _unpaired),
    "prompt and completion": (("prompt", "completion"), _completion),
    "Alpaca": (("instruction", "output"), _alpaca),
    "tokenised": (("input_ids",), _tokenised),
    "text": (("text",), _text),
}
_KNOWN = "; ".join(" and ".join(columns) for columns, _ in _FORMATS.values())
_REQUIRED = {column for columns, _ in _FORMATS.values() for column in columns}
_LISTS = {
    "messages",
    "conversations",
    "chosen",
    "rejected",
    "prompt",
    "completion",
    "tools",
    "history",
    "input_ids",
    "labels",
}
_TEXTS_OR_LISTS = {"prompt", "completion", "chosen", "rejected"}
COLUMNS = tuple(sorted(_REQUIRED | _LISTS | {"input", "system", "attention_mask", "kto_tag"}))


def format_of(value: Mapping[str, Any]) -> str | None:
    """The name of the format that has these columns, or None."""
    return next((name for name, (columns, _) in _FORMATS.items() if all(c in value for c in columns)), None)


# -- messages ----------------------------------------------------------------------------------------------------------


def _pair(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _require_texts(value: Mapping[str, Any], *names: str) -> None:
    wrong = [name for name in names if not isinstance(value[name], str)]
    if wrong:
        raise _Unusable(f"{' and '.join(wrong)} must be text")


def _messages(messages: Any) -> tuple[tuple[dict[str, Any], ...], tuple[Weight, ...]]:
    """Messages as templates take them, and the weight of each; the first that cannot be trained on is named."""
    if not isinstance(messages, list) or not messages:
        raise _Unusable("messages must be a list that is not empty")
    read = [_message(position, message) for position, message in enumerate(messages, 1)]
    if not any(message["role"] == "assistant" for message, _ in read):
        raise _Unusable("no message has the role assistant, so nothing would be trained", "nothing-trained")
    weights = tuple(weight for _, weight in read)
    return tuple(message for message, _ in read), weights if any(w is not None for w in weights) else ()


def _message(position: int, message: Any) -> tuple[dict[str, Any], Weight]:
    role = message.get("role") if isinstance(message, dict) else message
    role = "tool" if role == "function" else role
    if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
        raise _Unusable(f"message {position} has the role {role!r}; known are {', '.join(ROLES)}", "wrong-role")
    # A key without a value says nothing, and many templates would print it as "None".
    kept = {key: value for key, value in message.items() if value is not None and key not in _CONTROL_KEYS}
    kept["role"] = role
    where = f"message {position} ({role})"
    old = kept.pop("function_call", None) if role == "assistant" else None  # before there were several
    given = kept.pop("tool_calls", None)  # an empty list says nothing, and templates take it for calls
    if old and not given:
        given = [{"type": "function", "function": old}]
    calls = _calls(given, where) if role == "assistant" else []
    if calls:
        kept["tool_calls"] = calls
    parts: Parts | None = None
    if isinstance(kept.get("content"), list):
        parts = tuple(_part(where, part) for part in kept["content"])
        kept["content"] = "".join(text for text, _ in parts)
        parts = parts if any(weight is not None for _, weight in parts) else None
    if not isinstance(kept.get("content"), str) and not (calls and "content" not in kept):
        raise _Unusable(f"{where} has no text as its content")
    if role == "assistant" and not calls and not kept["content"].strip():
        raise _Unusable(f"{where} is empty", "empty-answer")
    weight = _weight(message, where)
    if role != "assistant" and (weight or any(w for _, w in parts or ())):
        raise _Unusable(f"{where} is to be trained, but only answers of the assistant are")
    return kept, parts if parts is not None and weight is None else weight


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls whose arguments are objects: OpenAI spells them as JSON text, templates print objects."""
    if calls in (None, []):
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _Unusable(f"{where}: tool_calls must be a list of objects")
    opened = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _Unusable(f"{where}: a tool call needs a function with a name")
        if isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise _Unusable(f"{where}: the arguments of {function.get('name')!r} are not valid JSON") from error
            opened_function = {**function, "arguments": arguments}
            call = {**call, "function": opened_function} if "function" in call else opened_function
        opened.append(call)
    return opened


def _part(where: str, part: Any) -> tuple[str, float | None]:
    if isinstance(part, str):
        return part, None
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise _Unusable(f"{where} has a part of the type {kind!r}; only text can be trained on")
    return part["text"], _weight(part, where)


def _weight(holder: Mapping[str, Any], where: str) -> float | None:
    """`weight` (a number from 0 to 1) or `train` (true or false) of a message or part; None where neither is given."""
    if isinstance(holder.get("train"), bool):
        return float(holder["train"])
    weight = holder.get("weight", holder.get("train"))
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise _Unusable(f"{where} has the weight {weight!r}; it must be a number from 0 to 1")
    return float(weight)


def _tools(value: Mapping[str, Any]) -> tuple[Any, ...]:
    tools = value.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise _Unusable(f"tools are not valid JSON ({error})") from error
    functions = value.get("functions")  # as they were called before
    if tools is None and isinstance(functions, list) and all(isinstance(function, dict) for function in functions):
        tools = [{"type": "function", "function": function} for function in functions]
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return tuple(tools or ())
    raise _Unusable("tools must be a list of objects")
