"""Files become rows exactly as they say, and every row that cannot be used is named with file, row and reason."""

import gzip
import json
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from deltaw.data.formats import Row, parse_sources, read_rows
from deltaw.data.source import Fault, Source, find_files, parse_source
from deltaw.errors import DataError

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def rows_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows([path]))


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_the_three_forms_of_a_row_are_read(tmp_path):
    content = lines({"messages": CHAT}, {"prompt": "2 + 2?", "completion": "4"}, {"text": "four"})
    assert rows_of(tmp_path / "a.jsonl", content) == [
        Row("a.jsonl", 1, tuple(CHAT)),
        Row("a.jsonl", 2, tuple(CHAT)),
        Row("a.jsonl", 3, text="four"),
    ]


def test_bom_crlf_blank_lines_and_a_missing_last_newline_change_nothing(tmp_path):
    content = b"\xef\xbb\xbf" + lines({"text": "a"}).replace("\n", "\r\n").encode() + b"\r\n  \n" + b'{"text": "b"}'
    assert rows_of(tmp_path / "a.jsonl", content) == [Row("a.jsonl", 1, text="a"), Row("a.jsonl", 4, text="b")]


def test_gzip_holds_the_same_rows_whatever_the_case_of_its_name(tmp_path):
    content = lines({"text": "a"}, {"text": "b"}).encode()
    for name in ("a.jsonl.gz", "B.JSONL.GZ"):
        assert [row.text for row in rows_of(tmp_path / name, gzip.compress(content))] == ["a", "b"]


def test_a_text_file_is_one_row(tmp_path):
    assert rows_of(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\n") == [Row("a.txt", 1, text="one\ntwo\n")]
    assert rows_of(tmp_path / "b.md", "# b") == [Row("b.md", 1, text="# b")]


def test_what_a_value_says_is_kept_as_it_is(tmp_path):
    text = 'null, 007, true, 1e3, " spaces "\u2028\u00e9\U0001f600\x00'
    assert rows_of(tmp_path / "a.jsonl", lines({"text": text}))[0].text == text


def test_tool_calls_may_stand_without_text_and_keys_without_value_are_left_out(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    messages = [CHAT[0], call, {"role": "tool", "content": "4", "name": None}, CHAT[1]]
    tools = [{"type": "function", "function": {"name": "add"}}]
    (row,) = rows_of(tmp_path / "a.jsonl", lines({"messages": messages, "tools": tools, "source": "made up"}))
    assert row.messages[1:3] == ({k: v for k, v in call.items() if v}, {"role": "tool", "content": "4"})
    assert row.tools == tuple(tools) and row.answer == "4"


FAULTS = {
    "{": "not valid JSON",
    "[1]": "must be an object, not list",
    "nul": "not valid JSON",
    "1" * 5000: "not valid JSON",
    "[" * 100_000: "not valid JSON",
    '{"text": "\\ud800"}': "not valid JSON",
    '{"chat": 1, "a": 2}': "none of messages; conversations; chosen and rejected; prompt and completion and label",
    '{"text": " "}': "text must be a string that is not empty",
    '{"text": 5}': "text must be a string",
    '{"prompt": "a", "completion": 4}': "prompt and completion must be strings or lists of messages",
    '{"prompt": "a", "completion": " "}': "message 2 (assistant) is empty",
    '{"messages": []}': "messages must be a list that is not empty",
    '{"messages": null}': "messages must be a list",
    '{"messages": ["hi"]}': "message 1 has the role 'hi'",
    '{"messages": [{"role": "human", "content": "a"}]}': "message 1 has the role 'human'; known are system, developer, user",
    '{"messages": [{"role": [], "content": "a"}]}': "message 1 has the role []",
    '{"messages": [{"role": "user", "content": 5}]}': "message 1 (user) has no text as its content",
    '{"messages": [{"role": "user", "content": "a"}]}': "nothing would be trained",
    '{"messages": [{"role": "assistant"}]}': "message 1 (assistant) has no text",
    json.dumps({"messages": CHAT, "tools": 5}): "tools must be a list of objects",
    json.dumps({"messages": CHAT, "tools": "add"}): "tools are not valid JSON",
}


def test_each_fault_names_its_file_row_and_reason_and_the_rows_around_it_are_kept(tmp_path):
    good = lines({"text": "good"})
    found = rows_of(tmp_path / "mixed.jsonl", good + "".join(f"{line}\n{good}" for line in FAULTS))
    assert len(found) == 2 * len(FAULTS) + 1
    assert all(isinstance(row, Row) and row.text == "good" for row in found[::2])
    for number, (fault, reason) in enumerate(zip(found[1::2], FAULTS.values(), strict=True)):
        assert isinstance(fault, Fault) and reason in fault.reason, fault
        assert str(fault).startswith(f"mixed.jsonl, row {2 * number + 2}: ")


def test_bytes_that_are_no_text_are_a_fault(tmp_path):
    assert "not valid JSON" in rows_of(tmp_path / "a.jsonl", b'{"text": "\xff"}')[0].reason
    assert "not valid UTF-8" in rows_of(tmp_path / "a.txt", b"\xff")[0].reason
    assert "empty" in rows_of(tmp_path / "b.txt", b" \n")[0].reason


def test_a_damaged_gzip_file_is_refused_with_the_row_where_it_ends(tmp_path):
    whole = gzip.compress(lines(*({"text": f"{n}" * 50} for n in range(3000))).encode())
    with pytest.raises(DataError, match="row"):
        rows_of(tmp_path / "cut.jsonl.gz", whole[:-20])
    with pytest.raises(DataError, match="row 0"):
        rows_of(tmp_path / "no.jsonl.gz", b"plain text")
    with pytest.raises(DataError, match="cannot be read"):
        rows_of(tmp_path / "flipped.jsonl.gz", whole[:10] + b"\xff" * 50 + whole[60:])


def test_every_missing_file_is_named_at_once_and_globs_give_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "c.jsonl").mkdir()
    assert [path.name for path in find_files([str(tmp_path / "*.jsonl")])] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in find_files([f"{tmp_path}/b.jsonl", f"{tmp_path}/a*"])] == ["b.jsonl", "a.jsonl"]
    with pytest.raises(DataError) as caught:
        find_files(["no.jsonl", str(tmp_path / "a.jsonl"), "nothing-*.jsonl", str(tmp_path)])
    assert all(name in str(caught.value) for name in ("no.jsonl", "nothing-*.jsonl", str(tmp_path)))
    assert "a.jsonl" not in str(caught.value)


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    (tmp_path / "a[1].jsonl").write_text("")
    assert find_files([str(tmp_path / "a[1].jsonl")]) == [(tmp_path / "a[1].jsonl").resolve()]


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"table\.xlsx.*\.jsonl"):
        rows_of(tmp_path / "table.xlsx", "a,b")


# -- containers and sources --------------------------------------------------------------------------------------------


PAIRS = [{"prompt": f"q {n}", "completion": "a\nb" if n else 'say "é", null'} for n in range(5)]


def as_csv(delimiter):
    rows = [delimiter.join(PAIRS[0])]
    rows += [delimiter.join('"{}"'.format(value.replace('"', '""')) for value in row.values()) for row in PAIRS]
    return ("\r\n".join(rows) + "\r\n").encode("utf-8-sig")


def in_arrow(path, *, stream):
    table = pyarrow.Table.from_pylist(PAIRS)
    opener = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with opener(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def written(path):
    """The five pairs in the container that the name asks for."""
    plain = lines(*PAIRS).encode()
    content = {
        "a.jsonl": plain,
        "a.json": json.dumps(PAIRS, indent=1).encode("utf-8-sig"),
        "lines.json": plain,
        "a.jsonl.gz": gzip.compress(plain),
        "a.json.gz": gzip.compress(json.dumps(PAIRS).encode()),
        "a.csv": as_csv(","),
        "a.tsv": as_csv("\t"),
        "a.csv.gz": gzip.compress(as_csv(",")),
    }
    if path.name in content:
        path.write_bytes(content[path.name])
    elif path.name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path, row_group_size=2)
    elif path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(plain)
    elif path.suffix == ".arrow":
        in_arrow(path, stream=path.stem == "stream")
    else:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(PAIRS).save_to_disk(str(path))
    return path


CONTAINERS = [
    *("a.jsonl", "a.json", "lines.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.csv.gz"),
    *("a.parquet", "stream.arrow", "file.arrow", "folder"),
]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path, name):
    path = written(tmp_path / name)
    assert find_files([str(path)]) == [path]
    assert list(read_rows([path])) == [
        Row(name, number, ({"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}))
        for number, p in enumerate(PAIRS, 1)
    ]


def test_a_folder_with_several_splits_gives_the_one_asked_for(tmp_path):
    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    assert [row.text for row in read_rows([f"{tmp_path}/both"])] == ["train"]
    assert [row.text for row in read_rows([f"{tmp_path}/both::split=test"])] == ["test"]
    with pytest.raises(DataError, match=r"no split 'dev'; give .*one of test, train"):
        list(read_rows([f"{tmp_path}/both::split=dev"]))


def test_a_data_set_as_the_hub_has_it_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(lines(*PAIRS))
    rows = list(read_rows([f"hub:{tmp_path}/set"]))
    assert [row.messages[0]["content"] for row in rows] == [p["prompt"] for p in PAIRS]
    with pytest.raises(DataError, match="Could not read hub:"):
        list(read_rows([f"hub:{tmp_path}/nothing"]))


def test_nulls_that_an_arrow_schema_added_are_gone_and_those_of_json_stay(tmp_path):
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": 2})]
    rows = [{"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call]}]} for call in calls]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in read_rows([tmp_path / "a.parquet"])]
    assert read == [{"a": 1}, {"b": 2}]
    (tmp_path / "a.jsonl").write_text(lines({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": {"a": None}}}]}]}))  # fmt: skip
    (row,) = read_rows([tmp_path / "a.jsonl"])
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_lists_may_stand_as_json_in_the_cells_of_a_table(tmp_path):
    cell = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,label\n"{cell}",x\n"[broken",x\n')
    first, second = read_rows([tmp_path / "a.csv"])
    assert first.messages == tuple(CHAT) and "messages is not valid JSON" in second.reason


def test_texts_of_a_table_that_look_like_json_stay_texts(tmp_path):
    answers = ['{"name": "Bob"}', "[1, 2]", "[INST] hi", "[1] Smith", "{x}"]
    rows = ["prompt,completion", *('q,"{}"'.format(answer.replace('"', '""')) for answer in answers)]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n\n")  # and an empty line is no row
    assert [row.answer for row in read_rows([tmp_path / "a.csv"])] == answers
    chosen = json.dumps(CHAT).replace('"', '""')
    other = json.dumps([CHAT[0], {**CHAT[1], "content": "5"}]).replace('"', '""')
    (tmp_path / "b.csv").write_text(f'chosen,rejected\n"{chosen}","{other}"\n')
    (row,) = read_rows([tmp_path / "b.csv"])
    assert row.messages == tuple(CHAT)


def test_lists_in_the_cells_of_a_table_are_opened_under_their_new_names(tmp_path):
    cell = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'dialog\n"{cell}"\n')
    (row,) = read_rows(parse_sources([str(tmp_path / "a.csv")], ["messages=dialog"]))
    assert row.messages == tuple(CHAT)


def test_a_prompt_that_both_answers_repeat_behind_what_the_system_says_stands_once(tmp_path):
    before = [{"role": "system", "content": "S"}, CHAT[0]]
    answers = [[*before, {"role": "assistant", "content": text}] for text in ("A", "B")]
    value = {"prompt": CHAT[0]["content"], "chosen": answers[0], "rejected": answers[1]}
    (row,) = rows_of(tmp_path / "a.jsonl", lines(value))
    assert row.messages == tuple(answers[0]) and row.rejected == tuple(answers[1][2:])


def test_a_split_of_a_single_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"messages": CHAT}))
    with pytest.raises(DataError, match="has no split 'test'"):
        list(read_rows([f"{tmp_path}/a.jsonl::split=test"]))


def test_a_table_parted_by_another_mark_is_refused_with_the_mark_it_should_have(tmp_path):
    for name, header, wanted in (("a.csv", "prompt;answer", "';' parts columns"), ("a.tsv", "prompt,answer", "'\\t'")):
        (tmp_path / name).write_text(f"{header}\nq{header[6]}a\n")
        with pytest.raises(DataError, match="single column") as caught:
            list(read_rows([tmp_path / name]))
        assert wanted in str(caught.value)
    (tmp_path / "text.csv").write_text("text\none column is enough; for plain text\n")
    assert len(list(read_rows([tmp_path / "text.csv"]))) == 1


def test_columns_are_renamed_for_all_sources_or_for_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"question": "q", "reply": "a", "text": "not this"}))
    sources = parse_sources([f"{tmp_path}/a.jsonl::prompt=question"], ["completion=reply"])
    assert [row.answer for row in read_rows(sources)] == ["a"]
    (fault,) = read_rows(parse_sources([f"{tmp_path}/a.jsonl::prompt=wrong"]))
    assert fault.code == "wrong-shape" and "no column 'wrong', which is to be read as prompt" in fault.reason


def test_a_cap_takes_the_first_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*PAIRS))
    assert [row.number for row in read_rows([f"{tmp_path}/a.jsonl::cap=2"])] == [1, 2]
    assert parse_source("a::weight=0.5,cap=3") == Source("a", weight=0.5, cap=3)


def test_rows_to_answer_may_lack_their_last_answer(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    values = [
        {"messages": [user]},
        {"messages": [user, answer, user]},
        {"messages": [user, answer]},
        {"conversations": [{"from": "human", "value": "q"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q"},
        {"prompt": [user], "system": "s"},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": ""},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text(lines(*values))
    texts = [
        "".join(f"{m['role'][0]}{m['content']} " for m in row.messages).strip()
        for row in read_rows([tmp_path / "a.jsonl"], to_answer=True)
    ]
    assert texts == ["uq", "uq aa uq", "uq aa", "uq", "uq aa", "uq", "ss uq", "uq aa", "uq", "uq aa", "uq aa"]
    (tmp_path / "a.csv").write_text("prompt,completion\nq,\nq,a\n")
    open_ended, whole = read_rows([tmp_path / "a.csv"], to_answer=True)
    assert open_ended.messages == (user,) and whole.messages == (user, answer)
    assert [type(row) for row in read_rows([tmp_path / "a.csv"])] == [Fault, Row]


def test_every_fault_of_the_sources_is_listed_at_once():
    with pytest.raises(DataError) as caught:
        parse_sources(["a::weight=0,cap=x", "b::speed=2", "c::weight", "d::config=en::split=train"], ["question"])
    for text in (
        "weight=0",
        "cap=x",
        "'speed' is none of weight, cap",
        "must look like key=value",
        "'config=en::split=train': options are separated by commas",
        "--columns question",
    ):
        assert text in str(caught.value)


def test_what_needs_an_extra_says_which(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"a\.parquet needs pyarrow: pip install pyarrow"):
        list(read_rows([tmp_path / "a.parquet"]))
    with pytest.raises(DataError, match=r"needs datasets: pip install datasets"):
        list(read_rows(["hub:org/name"]))


# -- nothing is lost or taken for something else -----------------------------------------------------------------------


def one_row(tmp_path, value, name="a.jsonl"):
    (row,) = rows_of(tmp_path / name, lines(value) if isinstance(value, dict) else value)
    return row


def test_a_system_column_is_the_first_message_of_every_format(tmp_path):
    system, pair = {"role": "system", "content": "Be terse."}, {"prompt": "2 + 2?", "completion": "4"}
    for value in (
        {"messages": CHAT},
        pair,
        {**pair, "label": True},
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    ):
        row = one_row(tmp_path, {"system": "Be terse.", **value})
        assert row.messages == (system, *CHAT), value
        assert row.context == (0 if "messages" in value else 2)
    turns = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
    assert one_row(tmp_path, {"system": "Be terse.", **turns}).messages == (system, *CHAT)
    pairs = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
    asked = {"system": "Be terse.", "conversations": turns["conversations"][:1]}
    assert one_row(tmp_path, {**asked, **pairs}).messages == (system, *CHAT)
    assert one_row(tmp_path, {**turns, "chosen": None, "rejected": None}).messages == tuple(CHAT)
    twice = one_row(tmp_path, {"system": "Be terse.", "messages": [{**system, "content": "Be long."}, *CHAT]})
    assert "different things" in twice.reason
    assert one_row(tmp_path, {"system": "Be terse.", "messages": [system, *CHAT]}).messages == (system, *CHAT)


@pytest.mark.parametrize(
    "value",
    [
        {"messages": CHAT, "label": False},
        {"messages": CHAT, "kto_tag": False},
        {"instruction": "2 + 2?", "output": "4", "kto_tag": False},
    ],
)
def test_an_answer_that_is_labelled_as_bad_is_left_out_in_every_format(tmp_path, value):
    assert one_row(tmp_path, value).skip == "its answer is labelled as bad"
    good = {key: True if isinstance(item, bool) else item for key, item in value.items()}
    assert one_row(tmp_path, good).skip is None
    bad, fine = rows_of(tmp_path / "a.csv", "instruction,output,kto_tag\nq,a,false\nq,a,True\n")
    assert (bad.skip is None, fine.skip is None) == (False, True)
    assert one_row(tmp_path, {"messages": CHAT, "kto_tag": None}).skip is None


def test_of_a_pair_behind_turns_the_chosen_answer_is_trained(tmp_path):
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}, {"from": "human", "value": "2 + 2?"}]
    answers = {"chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}
    row = one_row(tmp_path, {"conversations": turns, **answers})
    assert [message["content"] for message in row.messages] == ["1 + 1?", "2", "2 + 2?", "4"] and row.context == 3
    assert row.rejected == ({"role": "assistant", "content": "5"},)


def test_calls_as_they_were_written_before_and_empty_lists_of_calls(tmp_path):
    function = {"name": "add", "arguments": '{"x": 1}'}
    old = [CHAT[0], {"role": "assistant", "content": None, "function_call": function}]
    row = one_row(tmp_path, {"messages": old, "functions": [{"name": "add"}]})
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
    assert row.tools == ({"type": "function", "function": {"name": "add"}},) and "function_call" not in row.messages[1]
    for nothing in ({"tool_calls": []}, {"function_call": {}}, {"function_call": None}):
        assert one_row(tmp_path, {"messages": [CHAT[0], {**CHAT[1], **nothing}]}).messages == tuple(CHAT)


def test_an_empty_cell_makes_a_row_no_other_format(tmp_path):
    found = rows_of(tmp_path / "a.csv", "instruction,output,text\nq,a,q a\nq,,q\n,,free\n")
    assert [type(row) for row in found] == [Row, Fault, Row]
    assert "output is empty, which Alpaca needs" in found[1].reason and found[2].text == "free"
    (unlabelled,) = rows_of(tmp_path / "b.csv", "prompt,completion,label\nq,a,\n")
    assert "label is empty" in unlabelled.reason


@pytest.mark.parametrize("row", [b'"He said "hi" there",x\n', "caf\u00e9,x\n".encode("cp1252")])
def test_a_table_that_breaks_off_is_refused_and_not_read_in_part(tmp_path, row):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na,b\n" + row + b"c,d\n" * 9)
    with pytest.raises(DataError, match="cannot be read behind row"):
        list(read_rows([path]))


def test_a_split_of_a_data_set_that_has_none_is_refused_and_endings_may_be_capitals(tmp_path):
    table = datasets.Dataset.from_list([{"text": "a"}])
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no split 'test'"):
        list(read_rows([f"{tmp_path / 'saved'}::split=test"]))
    table.to_parquet(tmp_path / "DATA.PARQUET")
    assert [row.text for row in read_rows([tmp_path / "DATA.PARQUET"])] == ["a"]
