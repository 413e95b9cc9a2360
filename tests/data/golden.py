"""The inputs of the golden cases: every format with its variants. `python tests/data/golden.py` writes golden.json anew;
read the difference before it is committed, since the tests only say that nothing changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import CHAT_TEMPLATE, byte_tokenizer

from deltaw.data.chat import Encoded, Encoder
from deltaw.data.formats import to_row
from deltaw.data.source import Fault, Record

STORED = Path(__file__).parent / "golden.json"
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools|tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{% for call in m['tool_calls'] or [] %}{{ '[' + call['function']['name'] + ' ' + call['function']['arguments']|tojson + ']' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
MARKED_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"plain": CHAT_TEMPLATE, "tools": TOOL_TEMPLATE, "marked": MARKED_TEMPLATE, "none": None}


def u(text: Any = "q", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def a(text: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


S, T = {"role": "system", "content": "be brief"}, {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TWO = [u("one"), a("1"), u("two"), a("2")]
# name: (row, template, settings of the encoder)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "chat: one turn": ({"messages": [u(), a()]}, "plain", {}),
    "chat: two turns": ({"messages": TWO}, "plain", {}),
    "chat: system": ({"messages": [S, u(), a()]}, "plain", {}),
    "chat: developer becomes system": ({"messages": [{**S, "role": "developer"}, u(), a()]}, "plain", {}),
    "chat: unicode": ({"messages": [u("hé \U0001f600"), a("naïve")]}, "plain", {}),
    "chat: spaces and lines": ({"messages": [u(" q\n"), a("\n\n a \n")]}, "plain", {}),
    "chat: nulls say nothing": ({"messages": [u(name=None), a(tool_calls=None)], "tools": None}, "plain", {}),
    "chat: content in parts": ({"messages": [u([part("a "), part("b")]), a([part("c"), "d"])]}, "plain", {}),
    "chat: ends with a question": ({"messages": [*TWO, u("three")]}, "plain", {}),
    "chat: tool call and result": (
        {"messages": [u(), a(None, tool_calls=[call({"x": 2})]), T, a("4")], "tools": TOOLS}, "tools", {}),
    "chat: arguments as text": ({"messages": [u(), a("", tool_calls=[call('{"x": 2}')]), T, a("4")]}, "tools", {}),
    "chat: role function": ({"messages": [u(), a(tool_calls=[call({})]), {**T, "role": "function"}, a("4")]}, "tools", {}),
    "chat: weight 0": ({"messages": [u("one"), a("1", weight=0), u("two"), a("2", weight=1)]}, "plain", {}),
    "chat: weight 0.5": ({"messages": [u("one"), a("1", weight=0.5), u("two"), a("2")]}, "plain", {}),
    "chat: train false": ({"messages": [u("one"), a("1", train=False), u("two"), a("2")]}, "plain", {}),
    "chat: weight 0 of a question": ({"messages": [u("one", weight=0), a("1")]}, "plain", {}),
    "chat: parts with weights": ({"messages": [u(), a([part("keep "), part("drop", train=False), part(" end")])]}, "plain", {}),
    "chat: last part untrained": ({"messages": [u(), a([part("keep"), part(" drop", weight=0)])]}, "plain", {}),
    "chat: parts with half weights": ({"messages": [u(), a([part("x", weight=0.5), part("y")])]}, "plain", {}),
    "chat: mask last": ({"messages": TWO}, "plain", {"train_on": "last"}),
    "chat: mask completion": ({"messages": TWO}, "plain", {"train_on": "completion"}),
    "chat: mask all": ({"messages": TWO}, "plain", {"train_on": "all"}),
    "chat: marked template": ({"messages": [S, *TWO]}, "marked", {}),
    "chat: marked, mask last": ({"messages": TWO}, "marked", {"train_on": "last"}),
    "chat: marked, weight 0": ({"messages": [u(), a("1", weight=0), u(), a("2")]}, "marked", {}),
    "chat: cut": ({"messages": [u(), a("a long answer")]}, "plain", {"max_length": 30}),
    "chat: control token allowed": ({"messages": [u("<|im_end|>"), a()]}, "plain", {"allow": ("control-tokens",)}),
    "chat: control token refused": ({"messages": [u("<|im_end|>"), a()]}, "plain", {}),
    "ShareGPT: human and gpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "plain", {}),
    "ShareGPT: system column": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "be brief"}, "plain", {}),
    "ShareGPT: system turn": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        "plain", {}),
    "ShareGPT: call and observation": (
        {"conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 2}}'},
            {"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4."}], "tools": json.dumps(TOOLS)},
        "tools", {}),
    "ShareGPT: weight": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "1", "weight": 0},
                           {"from": "human", "value": "r"}, {"from": "gpt", "value": "2"}]}, "plain", {}),
    "ShareGPT: role and content": ({"conversations": [u(), a()]}, "plain", {}),
    "ShareGPT: kto_tag true": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": True}, "plain", {}),
    "ShareGPT: kto_tag false": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False}, "plain", {}),
    "Alpaca: instruction": ({"instruction": "do", "output": "done"}, "plain", {}),
    "Alpaca: input": ({"instruction": "do", "input": "this", "output": "done"}, "plain", {}),
    "Alpaca: empty input": ({"instruction": "do", "input": "", "output": "done"}, "plain", {}),
    "Alpaca: system and history": (
        {"instruction": "do", "output": "done", "system": "be brief", "history": [["hi", "ho"]]}, "plain", {}),
    "Alpaca: history, mask last": ({"instruction": "do", "output": "done", "history": [["hi", "ho"]]}, "plain", {"train_on": "last"}),
    "prompt and completion: texts": ({"prompt": "q", "completion": "a"}, "plain", {}),
    "prompt and completion: messages": ({"prompt": [u()], "completion": [a()]}, "plain", {}),
    "prompt and completion: answers in the prompt are context": ({"prompt": [u("one"), a("1"), u("two")], "completion": [a("2")]}, "plain", {}),
    "prompt and completion: several answers": ({"prompt": [u("one")], "completion": [a("1"), u("two"), a("2")]}, "plain", {}),
    "prompt and completion: several, mask completion": (
        {"prompt": [u("one")], "completion": [a("1"), u("two"), a("2")]}, "plain", {"train_on": "completion"}),
    "prompt and completion: several, mask last": (
        {"prompt": [u("one")], "completion": [a("1"), u("two"), a("2")]}, "plain", {"train_on": "last"}),
    "prompt and completion: text and messages": ({"prompt": "q", "completion": [a()]}, "plain", {}),
    "prompt and completion: no template": ({"prompt": "q: ", "completion": "a"}, "none", {}),
    "prompt and completion: mask all": ({"prompt": "q", "completion": "a"}, "plain", {"train_on": "all"}),
    "text: whole": ({"text": "some text"}, "plain", {}),
    "text: no template": ({"text": "some text"}, "none", {}),
    "text: in pieces": ({"text": "abcdefghij"}, "plain", {"max_length": 5}),
    "text: unicode": ({"text": "é\U0001f600\n"}, "plain", {}),
    "preference: texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "plain", {}),
    "preference: messages": ({"prompt": [u()], "chosen": [a("good")], "rejected": [a("bad")]}, "plain", {}),
    "preference: implicit prompt": ({"chosen": [u(), a("good")], "rejected": [u(), a("bad")]}, "plain", {}),
    "preference: implicit prompt of two turns": (
        {"chosen": [u(), a(), u("r"), a("good")], "rejected": [u(), a(), u("r"), a("bad")]}, "plain", {}),
    "preference: prompt given and repeated": ({"prompt": "q", "chosen": [u(), a("good")], "rejected": [u(), a("bad")]}, "plain", {}),
    "unpaired: good": ({"prompt": "q", "completion": "a", "label": True}, "plain", {}),
    "unpaired: bad": ({"prompt": "q", "completion": "a", "label": False}, "plain", {}),
    "tokenised: labels": ({"input_ids": [1, 70, 71, 2], "labels": [-100, -100, 71, 2]}, "plain", {}),
    "tokenised: no labels": ({"input_ids": [70, 71, 2]}, "plain", {}),
    "tokenised: padding": ({"input_ids": [0, 0, 70, 2], "labels": [-100, -100, 70, 2], "attention_mask": [0, 0, 1, 1]}, "plain", {}),
    "tokenised: assistant_masks": ({"input_ids": [1, 70, 2], "assistant_masks": [0, 1, 1]}, "plain", {}),
    "tokenised: completion_mask": ({"input_ids": [1, 70, 2], "completion_mask": [0, 0, 1]}, "plain", {}),
    "tokenised: cut": ({"input_ids": [70, 71, 72, 73], "labels": [-100, 71, 72, 73]}, "plain", {"max_length": 3}),
}  # fmt: skip


def outcome(name: str) -> dict[str, Any]:
    """What becomes of a case: the format, and for each document its text with what is trained in ⟦ ⟧, ids and weights."""
    value, template, settings = CASES[name]
    encoder = Encoder(byte_tokenizer(TEMPLATES[template]), **{"max_length": 500, **settings})
    row = to_row(Record("golden", 1, value))
    (found,) = encoder.encode_many([row])
    if isinstance(found, Fault):
        return {"code": found.code, "reason": found.reason}
    assert isinstance(found, Encoded)
    documents = [_document(encoder, example) for example in found.examples]
    notes = {"notes": [code for code, _ in found.notes]} if found.notes else {}
    skipped = {"skipped": found.row.skip} if found.row.skip else {}
    return {"format": found.row.format, "documents": documents, **notes, **skipped}


def _document(encoder: Encoder, example: Any) -> dict[str, Any]:
    shown, before = [], 0.0
    runs: list[list[float]] = []
    for token, weight in zip(example.tokens.tolist(), example.weights.tolist(), strict=True):
        if weight != before:
            shown += ["⟧"] if before else []
            shown += ["⟦" if weight == 1 else f"{weight:g}·⟦"] if weight else []
        if not runs or runs[-1][0] != weight:
            runs.append([weight, 0])
        runs[-1][1] += 1
        shown.append(token)
        before = weight
    text = "".join(_text(encoder, shown)) + ("⟧" if before else "")
    return {"shown": text, "tokens": example.tokens.tolist(), "weights": runs}


def _text(encoder: Encoder, shown: list[Any]) -> list[str]:
    parts: list[str] = []
    run: list[int] = []
    for item in [*shown, ""]:
        if isinstance(item, int):
            run.append(item)
            continue
        parts += [encoder.tokenizer.decode(run)] if run else []
        run = []
        parts.append(item)
    return parts


if __name__ == "__main__":
    lines = (f"  {json.dumps(name)}: {json.dumps(outcome(name), ensure_ascii=False)}" for name in CASES)
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
