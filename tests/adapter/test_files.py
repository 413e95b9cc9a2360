"""The folder: what is written is what is read, and what cannot be read as it was meant is refused by name."""

from __future__ import annotations

import json
import platform
import resource
import socket
import time
from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cases import CASES, Case, output, tokens
from models import small_model

from deltaw.adapter import Adapter, LoraSpec, choose_for, inject, read_adapter, write_adapter
from deltaw.adapter.files import CONFIG, MANIFEST, WEIGHTS
from deltaw.adapter.keys import PREFIX
from deltaw.errors import AdapterError, DiskError

EACH_KIND = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A plain adapter of the small Llama as PEFT would leave it: no manifest."""
    model = small_model("llama")
    path = write_adapter(CASES["plain"].adapter(model), tmp_path / "adapter")
    (path / MANIFEST).unlink()
    return path


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, edit) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as raised:
        read_adapter(folder)
    return str(raised.value)


# -- round trips ------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_save_load_save_is_byte_identical(case: Case, tmp_path):
    adapter = case.adapter(case.model())
    adapter.origin.update(base="someone/model", data="sha256:0", task_type="CAUSAL_LM")
    first = write_adapter(adapter, tmp_path / "first")
    read = read_adapter(first)
    second = write_adapter(read, tmp_path / "elsewhere" / "second")
    for name in (CONFIG, WEIGHTS, MANIFEST):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert sorted(path.name for path in first.iterdir()) == [CONFIG, WEIGHTS, MANIFEST]
    assert read.origin == adapter.origin
    assert (read.modules, read.transposed) == (adapter.modules, adapter.transposed)
    assert sorted(read.parameter_names) == sorted(adapter.parameter_names)
    assert sorted(read.embeddings) == sorted(adapter.embeddings)


@EACH_KIND
def test_what_is_read_does_the_same_work(case: Case, tmp_path):
    model, inputs = case.model(), case.inputs()
    adapter = case.adapter(model)
    with inject(model, adapter):
        expected = output(model, inputs)
    with inject(model, read_adapter(write_adapter(adapter, tmp_path / "adapter"))):
        assert torch.equal(output(model, inputs), expected)


def test_the_files_hold_no_path_no_host_and_no_time(tmp_path, monkeypatch):
    host = "a-host-whose-name-stands-nowhere-else"
    monkeypatch.setattr(platform, "node", lambda: host)
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    adapter = CASES["plain"].adapter(small_model("llama"))
    write_adapter(adapter, tmp_path / "here")
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    later = time.time() + 400 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    write_adapter(adapter, tmp_path / "there")
    for path in (tmp_path / "there").iterdir():
        content = path.read_bytes()
        assert content == earlier[path.name]
        assert str(tmp_path).encode() not in content and host.encode() not in content


def test_the_order_of_patterns_survives_since_the_first_match_wins(tmp_path):
    patterns = {"v_proj": 2, "layers.0.self_attn.v_proj": 3}
    spec = LoraSpec(
        rank=4, targets=("v_proj",), rank_pattern=patterns, alpha_pattern={"v_proj": 1, "0.self_attn.v_proj": 9}
    )
    case = Case(lambda: None, spec, lambda: None)
    read = read_adapter(write_adapter(case.adapter(small_model("llama")), tmp_path / "adapter"))
    assert list(read.spec.rank_pattern.items()) == list(patterns.items())
    assert read.spec.scale_of("model.layers.0.self_attn.v_proj") == 0.5


def test_a_saved_dtype_is_kept(tmp_path):
    adapter = CASES["plain"].adapter(small_model("llama"))
    half = {name: type(f)(f.A.bfloat16(), f.B.half()) for name, f in adapter.factors.items()}
    read = read_adapter(write_adapter(adapter.with_factors(half), tmp_path / "adapter"))
    assert {(f.A.dtype, f.B.dtype) for f in read.factors.values()} == {(torch.bfloat16, torch.float16)}


def test_a_folder_that_stood_there_is_replaced_whole(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "stale.bin").write_text("x")
    write_adapter(CASES["plain"].adapter(small_model("llama")), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "stale.bin").exists()


# -- refusals of writing ----------------------------------------------------------------------------------------------


def test_dora_on_experts_is_refused_when_writing(tmp_path):
    adapter = CASES["experts"].adapter(small_model("mixtral"))
    name = adapter.parameter_names[0]
    adapter.factors[name].magnitude = torch.ones(4)
    with pytest.raises(AdapterError, match="no DoRA for stacked or fused parameters"):
        write_adapter(adapter, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_empty_or_not_finite_is_refused_when_writing(tmp_path):
    with pytest.raises(AdapterError, match="no factors at all"):
        write_adapter(Adapter(LoraSpec(), {}), tmp_path / "adapter")
    adapter = CASES["plain"].adapter(small_model("llama"))
    first, second, *_ = adapter.factors
    adapter.factors[first].A[0, 0] = float("nan")
    adapter.factors[second].B[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=rf"(?s){first}: A holds NaN.*{second}: B holds NaN"):
        write_adapter(adapter, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


# -- refusals of settings ---------------------------------------------------------------------------------------------

REFUSED = {
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1], [0, 2]],
    "ensure_weight_tying": True,
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "velora_config": {"a": 1},
    "use_bdlora": True,
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "peft_type": "LOHA",
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {".*q_proj": 4},
    "alpha_pattern": {"(q|k)_proj": 4},
    "use_something_new": True,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_changes_the_result_is_refused_by_name(key, folder):
    edit_config(folder, **{key: REFUSED[key]})
    assert f"- {key} " in refusal(folder)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_edits_the_base_is_refused(start, folder):
    edit_config(folder, init_lora_weights=start)
    assert f"init_lora_weights = '{start}' changes the base" in refusal(folder)


def test_all_faults_of_a_folder_are_listed_at_once(folder):
    edit_config(folder, **{key: value for key, value in REFUSED.items() if "pattern" not in key})
    edit_tensors(folder, lambda tensors: tensors.pop(Q + ".lora_A.weight"))
    said = refusal(folder)
    assert [key for key in REFUSED if "pattern" not in key and f"- {key} " not in said] == []
    assert "q_proj: A is missing" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": "8"}, "rank must be a whole number"),
        ({"r": None}, "rank must be a whole number"),
        ({"lora_alpha": -1}, "alpha must be a positive number"),
        ({"lora_dropout": "much"}, "dropout must be in"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank of 'q_proj' must be"),
        ({"r": 8}, "do not have the rank 8 of the config"),
        ({"use_dora": True}, "magnitude is missing"),
    ],
)
def test_a_setting_without_meaning_is_refused(changes, said, folder):
    edit_config(folder, **changes)
    assert said in refusal(folder)


def test_defaults_that_peft_writes_are_accepted(folder):
    edit_config(
        folder, auto_mapping=None, corda_config=None, eva_config=None, loftq_config={}, megatron_core="megatron.core",
        peft_version="0.21.2", qalora_group_size=16, use_bdlora=None, use_something_new=None, another_one={},
    )  # fmt: skip
    assert len(read_adapter(folder).factors) == 14


def test_a_regular_expression_in_target_modules_is_never_run(folder):
    edit_config(folder, target_modules=r"(a+)+(a+)+(a+)+(a+)+$|model.*(_|_proj)+(_|_proj)+(_|_proj)+x")
    started = time.perf_counter()
    adapter = read_adapter(folder)
    assert time.perf_counter() - started < 1
    assert adapter.modules == tuple(sorted(adapter.factors))


def test_modules_that_more_than_their_names_select_are_named_in_full(folder):
    for layers in ([0, 1], 0):
        edit_config(folder, layers_to_transform=layers)
        adapter = read_adapter(folder)
        assert adapter.modules == tuple(sorted(adapter.factors))


# -- refusals of tensors ----------------------------------------------------------------------------------------------


def rename(old: str, new: str):
    def edit(tensors):
        tensors[new] = tensors.pop(old)

    return edit


def replace(key: str, change):
    def edit(tensors):
        tensors[key] = change(tensors[key]).contiguous()

    return edit


A, B = Q + ".lora_A.weight", Q + ".lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: tensors.pop(A), "q_proj: A is missing"),
        (lambda tensors: tensors.pop(B), "q_proj: B is missing"),
        (replace(A, lambda t: t.index_fill(0, torch.tensor(1), float("nan"))), "q_proj.lora_A.weight: holds NaN"),
        (replace(B, lambda t: t / 0), "q_proj.lora_B.weight: holds NaN or infinite"),
        (replace(A, lambda t: t.to(torch.int8)), "q_proj.lora_A.weight: stored as int8"),
        (replace(A, lambda t: t[:3]), "A [3, 32] and B [32, 4] do not have the rank 4"),
        (replace(A, lambda t: t[0]), "A [32] and B [32, 4] are no pair of factors"),
        (rename(A, A.replace(".model.", ".model._orig_mod.", 1)), "was saved from a compiled model"),
        (rename(A, A.removeprefix(PREFIX)), f"does not start with '{PREFIX}'"),
        (rename(A, Q + ".lora_A.default.weight"), "q_proj.lora_A.default.weight' is unknown"),
        (lambda tensors: tensors.update({Q + ".lora_B.bias": torch.ones(32)}), "q_proj.lora_B.bias' is unknown"),
        (lambda tensors: tensors.update({Q + ".lora_magnitude_vector": torch.ones(32)}), "although use_dora is false"),
        (lambda tensors: tensors.update({PREFIX + "lm_head.weight": torch.ones(3, 3)}), "lm_head.weight' is unknown"),
        (lambda tensors: tensors.clear(), "the file holds no factors"),
    ],
)
def test_a_damaged_file_is_refused_by_the_name_of_the_tensor(edit, said, folder):
    edit_tensors(folder, edit)
    assert said in refusal(folder)


def test_every_damaged_tensor_is_listed(folder):
    def edit(tensors):
        tensors.pop(A)
        for key in [key for key in tensors if "up_proj.lora_B" in key]:
            tensors[key] = tensors[key] * float("nan")

    edit_tensors(folder, edit)
    said = refusal(folder)
    assert said.count("up_proj.lora_B.weight: holds NaN") == 2 and "q_proj: A is missing" in said


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(content, folder):
    (folder / WEIGHTS).write_bytes(content)
    assert "is not a readable safetensors file" in refusal(folder)


def test_a_folder_with_a_pickle_only_is_refused_without_opening_it(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    said = refusal(folder)
    assert "adapter_model.bin, which can run code when read; save it again as safetensors" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("\udcff", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        (" " * (1 << 21), "it has more than 1,048,576 bytes"),
    ],
)
def test_a_config_that_is_no_object_is_refused(content, said, folder):
    (folder / CONFIG).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert said in refusal(folder)


def test_a_folder_that_is_none_is_told_from_a_run_folder(folder, tmp_path):
    assert "The folder does not exist" in refusal(tmp_path / "nowhere")
    assert f"It looks like a run folder; use {folder}" in refusal(tmp_path)


# -- the manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"sha256": 1, "origin": {}}', '{"sha256": {}, "origin": {}}', '{"sha256": {}, "origin": 3}'],
)
def test_a_damaged_manifest_is_refused(content, folder):
    (folder / MANIFEST).write_text(content)
    assert f"{MANIFEST} is damaged" in refusal(folder)


def test_a_file_changed_after_it_was_saved_is_refused(tmp_path):
    folder = write_adapter(CASES["plain"].adapter(small_model("llama")), tmp_path / "adapter")
    edit_config(folder, lora_alpha=9)
    assert f"{CONFIG} is not the file that was saved" in refusal(folder)


# -- copies of frozen weights -----------------------------------------------------------------------------------------


def test_a_copy_of_a_frozen_weight_is_accepted_when_equal_and_refused_when_different(tmp_path):
    model = small_model("llama")
    folder = write_adapter(CASES["head"].adapter(model), tmp_path / "adapter")
    (folder / MANIFEST).unlink()
    copy = model.lm_head.weight.detach().clone()
    edit_tensors(folder, lambda tensors: tensors.update({PREFIX + "lm_head.base_layer.weight": copy}))
    adapter = read_adapter(folder)
    with inject(model, adapter):
        output(model, tokens())
    assert len(choose_for(deepcopy(model).to("meta"), adapter)) == len(choose_for(model, adapter))  # of a run's sketch
    edit_tensors(folder, lambda tensors: tensors.update({PREFIX + "lm_head.base_layer.weight": copy.bfloat16()}))
    choose_for(model, read_adapter(folder))  # trained in bf16, and opened as stored
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(AdapterError, match="lm_head: the file's copy of the frozen weight differs"):
        inject(model, adapter)
    with pytest.raises(
        AdapterError, match="lm_head: the file holds a copy of a frozen weight that the model does not have"
    ):
        inject(small_model("llama").model, adapter)


def test_a_copy_of_a_frozen_bias_is_compared_too(tmp_path):
    """As PEFT writes it of a head that has one (phi-2, GPT-J)."""
    model = small_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
    folder = write_adapter(CASES["head"].adapter(model), tmp_path / "adapter")
    (folder / MANIFEST).unlink()
    bias = model.lm_head.bias.detach().clone()
    edit_tensors(folder, lambda tensors: tensors.update({PREFIX + "lm_head.base_layer.bias": bias}))
    choose_for(model, read_adapter(folder))
    model.lm_head.bias.data[0] += 1
    with pytest.raises(AdapterError, match="copy of the frozen weight differs"):
        choose_for(model, read_adapter(folder))
    with pytest.raises(AdapterError, match="that the model does not have"):
        choose_for(small_model("llama"), read_adapter(folder))


# -- experts ----------------------------------------------------------------------------------------------------------


def test_experts_whose_order_the_file_does_not_tell_are_refused(tmp_path):
    model = small_model("mixtral")
    adapter = CASES["experts"].adapter(model)
    folder = write_adapter(adapter, tmp_path / "adapter")
    (folder / MANIFEST).unlink()
    assert list(read_adapter(folder).parameter_names) == list(adapter.parameter_names)
    experts = f"{PREFIX}model.layers.0.mlp.experts"

    def make_alike(tensors):
        for part in ("lora_A.weight", "lora_B.weight"):
            tensors[f"{experts}.{part}"] = tensors[f"{experts}.base_layer.{part}"].clone()

    edit_tensors(folder, make_alike)
    assert "gate_up_proj, down_proj have one shape" in refusal(folder)


def test_nested_factors_that_the_config_does_not_name_are_refused(tmp_path):
    folder = write_adapter(CASES["experts"].adapter(small_model("mixtral")), tmp_path / "adapter")
    (folder / MANIFEST).unlink()
    edit_config(folder, target_parameters=None)
    assert "target_parameters names none of its parameters" in refusal(folder)
    edit_config(folder, target_parameters=["experts.down_proj"])
    assert "target_parameters names 1 of its parameters, the file holds 2" in refusal(folder)


def test_weights_that_the_disk_does_not_take_are_a_disk_error_and_leave_nothing(tmp_path):
    adapter = CASES["plain"].adapter(small_model("llama"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(DiskError, match="Could not write"):
            write_adapter(adapter, tmp_path / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
