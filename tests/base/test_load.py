"""What opens as a base and what is refused: local folders without a socket, no code, no pickle, nothing random."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from models import byte_tokenizer, save_base, small_model
from transformers import AutoModelForCausalLM, LlamaConfig

from deltaw.base import load as load_module
from deltaw.base.formed import has_one_dtype, stored_bytes, weight_files
from deltaw.base.gguf import convert_gguf
from deltaw.base.load import Base, load, public_name, weight_digest
from deltaw.errors import BaseError, UsageError
from deltaw.hardware import look

TOKENS = torch.arange(3, 40)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of the small base that a test may change."""
    return Path(shutil.copytree(llama_folder, tmp_path / "tiny-llama"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(name, **options):
    with pytest.raises(BaseError) as caught:
        load(name, **options)
    return str(caught.value)


def base_logits(base):
    return base.logits(base.hidden_states(TOKENS, torch.arange(len(TOKENS)), (0, len(TOKENS))))


def run_python(code, **environment):
    """What a fresh Python prints."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - started


# -- what opens --------------------------------------------------------------------------------------------------------


def test_a_local_folder_opens_frozen_and_gives_transformers_logits(llama_folder):
    base = load(llama_folder, dtype="float32")
    assert base.plain_reason is None and base.revision is None and base.name == "tiny-llama"
    assert (base.vocabulary, base.context_tokens, str(base.device)) == (259, 256, "cpu")
    assert base.parameters == sum(p.numel() for p in small_model("llama").parameters())
    assert base.weight_bytes == (llama_folder / "model.safetensors").stat().st_size
    assert not any(parameter.requires_grad for parameter in base.model.parameters()) and not base.model.training
    theirs = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)(TOKENS[None]).logits[0]
    torch.testing.assert_close(base_logits(base), theirs, atol=1e-5, rtol=0)
    assert base.tokenizer.chat_template == byte_tokenizer().chat_template


def test_opening_a_local_folder_never_reaches_for_a_socket(llama_folder, cache):
    code = f"""
import sys
seen = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        seen.append((event, arguments[1:]))
        raise OSError("no sockets here")
sys.addaudithook(watch)
import torch
from deltaw.base.load import load
base = load({str(llama_folder)!r})
ids = torch.tensor(base.tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}])["input_ids"])
print(base.logits(base.hidden_states(ids, torch.arange(len(ids)), (0, len(ids)))).shape[1], len(base.digest), seen)
"""
    assert run_python(code, DELTAW_CACHE=str(cache))[0].split(maxsplit=2) == ["259", "64", "[]\n"]


def write_gguf(path, model):
    """The small Llama as a GGUF file in fp16, with q and k permuted as llama.cpp has them."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary[:-1]] + ["ab"])  # the converter wants a merge that is used
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        values = tensor.numpy() if tensor.ndim == 1 else tensor.half().numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_opens_once_converted_and_gives_the_logits_of_its_folder(tmp_path, cache):
    config = LlamaConfig(**{**small_model("llama").config.to_dict(), "hidden_size": 64, "head_dim": 16})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model)
    convert_gguf(file, tmp_path / "converted")
    base, folder = load(file, dtype="float32"), load(tmp_path / "converted", dtype="float32")
    assert torch.equal(base_logits(base), base_logits(folder)) and base.digest == folder.digest
    assert base.name == "tiny.gguf" and base.folder.parent == cache / "gguf"
    made = (base.folder / "model.safetensors").stat().st_mtime_ns
    assert load(str(file)).folder.joinpath("model.safetensors").stat().st_mtime_ns == made


@pytest.mark.parametrize(("bf16", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_dtype_is_bf16_only_where_the_machine_computes_in_it(llama_folder, monkeypatch, bf16, expected):
    here = dataclasses.replace(look(), bf16_cpu=bf16, gpu=None, platform="Linux")
    monkeypatch.setattr(load_module, "look", lambda: here)
    assert load(llama_folder, device="cpu").dtype == expected


def test_named_dtypes_are_taken_and_float16_is_refused_before_anything_is_read(llama_folder):
    assert load(llama_folder, dtype="bfloat16").dtype == torch.bfloat16
    for name in ("float16", "int8"):
        with pytest.raises(UsageError, match="auto, float32, bfloat16"):
            load("no such folder", dtype=name)


def test_threads_are_set_and_zero_of_them_is_refused(llama_folder):
    before = torch.get_num_threads()
    try:
        for number in (2, 1):
            load(llama_folder, threads=number)
            assert torch.get_num_threads() == number
        with pytest.raises(UsageError, match="at least 1"):
            load(llama_folder, threads=0)
    finally:
        torch.set_num_threads(before)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_folder_of_pickles_is_refused_with_their_names_and_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "can run code" in message and "save_pretrained" in message


def test_code_in_a_folder_is_never_imported(folder, tmp_path):
    (folder / "canary.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'w')\nclass C: pass\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "canary.C", "AutoModelForCausalLM": "canary.C"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["canary.C", "canary.C"]})
    assert load(folder).plain_reason is None
    edit_json(folder / "config.json", model_type="songbird")
    message = refusal(folder)
    assert "'songbird'" in message and "does not run" in message
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no config.json"),
        ("{", "not valid JSON"),
        ("\x80", "not valid JSON"),
        ("[]", "must hold an object"),
        ("{}", "model_type None"),
        ('{"model_type": ["llama"]}', "model_type ['llama']"),
        ('{"model_type": "vit"}', "no causal language model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot be opened"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(folder, content, says):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert says in refusal(folder) and str(folder) in refusal(folder)


def test_missing_weights_are_refused_instead_of_made_up(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_blocks_that_the_config_does_not_count_are_refused_instead_of_dropped(kind, tmp_path):
    save_base(tmp_path / kind, kind)
    config = json.loads((tmp_path / kind / "config.json").read_text())
    key = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    edit_json(tmp_path / kind / "config.json", **{key: 1, "layer_types": (config.get("layer_types") or [])[:1] or None})
    says = refusal(tmp_path / kind)
    assert "blocks that its config.json does not count: 1." in says


def test_a_block_that_predicts_further_tokens_is_left_out(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights |= {name.replace("layers.1", "layers.2"): w.clone() for name, w in weights.items() if "layers.1" in name}
    weights["model.layers.2.eh_proj.weight"] = torch.zeros(4, 4)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert len(load(folder).model.model.layers) == 2


def test_damaged_weights_of_a_wrong_shape_and_damaged_tokenizers_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for part in (whole[:1000], whole[:-100], b""):
        (folder / "model.safetensors").write_bytes(part)
        assert "cannot be opened" in refusal(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(folder)
    edit_json(folder / "config.json", intermediate_size=50)
    assert "cannot be opened" in refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("token*"):
        path.unlink()
    assert "tokenizer" in refusal(folder)


def test_an_adapter_folder_is_not_taken_for_a_base(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert "adapter_config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "--adapter" in refusal(folder)


@pytest.mark.parametrize("name", ["nothing", "/nothing/here", "./nothing", "a/b/c"])
def test_a_name_that_stands_for_nothing_is_refused_with_the_built_in_names(name):
    assert "no such folder" in refusal(name) and "smollm2-135m" in refusal(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.txt").write_text("weights")
    assert "not a .gguf" in refusal(tmp_path / "model.txt")


def test_a_hub_name_without_a_network_ends_soon_with_a_next_step():
    code = """
from deltaw.base.load import load
from deltaw.errors import BaseError
try:
    load("nobody-at-all/no-such-model")
except BaseError as error:
    print(error)
"""
    message, seconds = run_python(code, HF_HUB_OFFLINE="1")
    assert "nobody-at-all/no-such-model" in message and "local folder" in message and len(message.splitlines()) == 1
    assert seconds < 20


# -- names and digests -------------------------------------------------------------------------------------------------


def test_a_public_name_never_holds_a_path(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "models" / "my-llama"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    spellings = [folder, str(folder), f"{folder}/", "~/models/my-llama", ".", "../my-llama", "../../models/my-llama"]
    assert {public_name(spelling) for spelling in spellings} == {"my-llama"}
    monkeypatch.chdir(folder.parent)
    assert public_name("my-llama") == "my-llama"
    assert public_name("smollm2-135m") == "smollm2-135m" and public_name("org/model") == "org/model"


def test_a_digest_is_of_the_weights_alone_and_survives_copying(folder, tmp_path, cache):
    first = weight_digest(folder)
    assert first == weight_digest(folder) and len(list((cache / "digests").iterdir())) == 1
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a model")
    assert weight_digest(tmp_path / "copy") == first
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert weight_digest(folder) != first


def test_a_cache_that_cannot_be_written_does_not_keep_a_base_from_opening(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "file"))
    assert len(weight_digest(folder)) == 64


def test_a_template_digest_changes_with_template_and_tokenizer_only(folder):
    tokenizer = byte_tokenizer()
    first = Base("a", folder, None, tokenizer).template_digest
    assert Base("b", folder.parent, None, byte_tokenizer()).template_digest == first
    other = byte_tokenizer(tokenizer.chat_template + " ")
    assert Base("a", folder, None, other).template_digest != first
    larger = byte_tokenizer()
    larger.add_tokens(["<extra>"])
    assert Base("a", folder, None, larger).template_digest != first


def test_an_origin_names_base_and_digests_and_no_path(folder):
    base = load(folder)
    assert base.origin == {"base": "tiny-llama", "base_digest": base.digest, "template_digest": base.template_digest}
    assert str(folder.parent) not in json.dumps(base.origin)
    assert dataclasses.replace(base, revision="v2").origin["revision"] == "v2"


def test_a_base_that_bitsandbytes_stored_is_refused_before_it_is_opened(tmp_path):
    folder = save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(BaseError, match="take the full ones, and --quant nf4 keeps"):
        load(folder)


def test_weights_that_lie_there_once_more_under_another_name_count_for_nothing(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "twice")
    before = stored_bytes(folder), weight_digest(folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert (stored_bytes(folder), weight_digest(folder)) == before
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]


def test_a_shard_that_was_cut_is_said_also_where_it_is_not_the_largest(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "cut")
    file = folder / "model.safetensors"
    small = folder / "model-2.safetensors"
    small.write_bytes(file.read_bytes()[:100])
    file.rename(folder / "model-1.safetensors")
    with pytest.raises(BaseError, match="model-2"):
        has_one_dtype(folder)
