"""Merged folders, opened again by transformers alone, give the logits of base and adapter together."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from models import byte_tokenizer, save_base, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltaw.adapter import LoraSpec, choose, inject, new_adapter
from deltaw.adapter.weight import dense_weight
from deltaw.base.formed import stored_weights
from deltaw.base.load import load
from deltaw.base.save import _usual_dtype, check_merged, write_merged
from deltaw.errors import AdapterError, DiskError, UsageError

TOKENS = (torch.arange(12) * 37 % 259)[None]
LINEAR = ("all-linear",)


def _folder(path, kind, shard=None, dtype=torch.float32):
    small_model(kind).to(dtype).save_pretrained(path, **({} if shard is None else {"max_shard_size": shard}))
    byte_tokenizer().save_pretrained(path)
    return path


def _adapter(base, targets=LINEAR, **spec):
    wanted = LoraSpec(rank=4, targets=tuple(targets), **spec)
    adapter = new_adapter(choose(base.model, wanted), wanted)
    for factors in adapter.factors.values():
        for _, tensor in factors.tensors():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return adapter


@torch.no_grad()
def _logits(model):
    return model(TOKENS, use_cache=False).logits


def _merge(folder, out, targets=LINEAR, **spec):
    """(logits of base and adapter, the merged model as plain transformers opens it)."""
    base = load(folder, device="cpu", dtype="float32")
    base.model.set_attn_implementation("sdpa")
    adapter = _adapter(base, targets, **spec)
    plain = _logits(base.model)
    with inject(base.model, adapter):
        wanted = _logits(base.model)
    assert float((wanted - plain).abs().max()) > 1e-3, "the adapter must make a difference"
    write_merged(base, adapter, out)
    assert check_merged(folder, adapter, out) == len(adapter.factors)
    assert torch.equal(_logits(base.model), plain), "the live base stays what it was"
    return wanted, transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("llama", {}), ("llama", {"dora": True}), ("gpt2", {"rslora": True}), ("gemma3", {}), ("mixtral", {})],
    ids=["llama", "dora", "gpt2", "gemma3", "mixtral"],
)
def test_a_merged_folder_gives_the_logits_of_base_and_adapter(tmp_path, kind, spec):
    folder = _folder(tmp_path / "base", kind)
    wanted, merged = _merge(folder, tmp_path / "merged", **spec)
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)


def test_everything_else_of_the_folder_stays_as_it_was(tmp_path):
    folder = _folder(tmp_path / "base", "llama")
    (folder / "LICENSE.txt").write_text("mine")
    _merge(folder, tmp_path / "merged", targets=["q_proj"])
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "merged").iterdir()}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes(), name
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)}


def test_shards_stay_shards(tmp_path):
    folder = _folder(tmp_path / "base", "llama", shard="20KB")
    wanted, merged = _merge(folder, tmp_path / "merged")
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)
    shards = [sorted(path.name for path in where.glob("*.safetensors")) for where in (folder, tmp_path / "merged")]
    assert shards[0] == shards[1] and len(shards[0]) > 2


@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids=["embedding", "head", "both"]
)
def test_adapting_one_of_two_tied_layers_parts_them(tmp_path, targets, shard):
    folder = _folder(tmp_path / "base", "llama-tied", shard)
    wanted, merged = _merge(folder, tmp_path / "merged", targets)
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    if shard is not None:
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        tensors = {}
        for path in (tmp_path / "merged").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                tensors |= dict.fromkeys(file.keys(), path.name)
        assert index["weight_map"] == tensors and "lm_head.weight" in tensors


def test_layers_stay_tied_when_neither_is_adapted(tmp_path):
    folder = _folder(tmp_path / "base", "llama-tied")
    wanted, merged = _merge(folder, tmp_path / "merged", ["down_proj"])
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_tied_head_that_is_stored_all_the_same_does_not_undo_the_merge(tmp_path):
    folder = _folder(tmp_path / "base", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wanted, merged = _merge(folder, tmp_path / "merged", ["embed_tokens"])
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)


def test_weights_stored_under_other_names_are_merged_all_the_same(tmp_path):
    folder = _folder(tmp_path / "base", "gpt2")  # as on the hub: without the outermost module's name
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wanted, merged = _merge(folder, tmp_path / "merged", ["c_attn", "c_proj"])
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)


def test_files_keep_their_dtype_and_the_sum_is_rounded_once(tmp_path):
    folder = _folder(tmp_path / "base", "llama", dtype=torch.bfloat16)
    base = load(folder, device="cpu", dtype="float32")
    adapter = _adapter(base, ["q_proj"])
    write_merged(base, adapter, tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for target in choose(base.model, adapter.spec):
        factors = adapter.factors[target.name]
        exact = dense_weight(target.holder) + target.delta(factors.A, factors.B)
        assert torch.equal(after[f"{target.name}.weight"], exact.bfloat16())


@pytest.mark.parametrize(
    ("stored", "said"),
    [(torch.float32, "bfloat16"), (torch.bfloat16, "float32"), (torch.float16, "float16"), (None, "bfloat16")],
    ids=["fp32 called bf16", "bf16 called fp32", "fp16", "some in fp32"],
)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weights_are_merged_in_the_dtype_of_their_files_whatever_the_config_says(kind, stored, said, tmp_path):
    """Of fp16, numbers below the smallest normal one are rounded too."""
    torch.manual_seed(0)
    model = small_model(kind).to(stored or torch.bfloat16)
    if stored is None:  # of an adapted layer, and of one that is none
        model.model.layers[0].self_attn.q_proj.float()
        model.model.norm.float()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "dtype": said}))
    base = load(tmp_path / "base", device="cpu", dtype="float32")
    adapter = _adapter(base, ["q_proj", "k_proj"])
    write_merged(base, adapter, tmp_path / "merged")
    assert check_merged(tmp_path / "base", adapter, tmp_path / "merged") == 4
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == ({stored} if stored else {torch.bfloat16, torch.float32})


def test_a_merge_that_lacks_one_update_or_changed_another_weight_is_refused(tmp_path):
    """In bf16, where one layer's update changes logits less than rounding does."""
    folder, out = _folder(tmp_path / "base", "llama", dtype=torch.bfloat16), tmp_path / "merged"
    base = load(folder, device="cpu", dtype="float32")
    adapter = _adapter(base, ["q_proj", "down_proj"])
    write_merged(base, adapter, out)
    lacking = "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[lacking] = load_file(folder / "model.safetensors")[lacking]
    tensors["model.norm.weight"][3] += 0.01
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="not the base with the adapter") as refused:
        check_merged(folder, adapter, out)
    assert f"{lacking} is not W + ΔW rounded once" in str(refused.value)
    assert "model.norm.weight is not the base's" in str(refused.value)
    assert str(refused.value).count("  - ") == 2, "and nothing else"


def test_a_second_format_beside_the_weights_is_left_out(tmp_path):
    folder = _folder(tmp_path / "base", "llama")
    save_file({"other": torch.zeros(2)}, folder / "consolidated.safetensors")
    wanted, merged = _merge(folder, tmp_path / "merged")
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)
    assert not (tmp_path / "merged" / "consolidated.safetensors").exists()


def test_named_templates_of_the_base_are_kept(tmp_path):
    folder = _folder(tmp_path / "base", "llama")
    more = folder / "additional_chat_templates"
    more.mkdir(exist_ok=True)
    (more / "tool_use.jinja").write_text("{{ tools }}")
    _merge(folder, tmp_path / "merged")
    assert (tmp_path / "merged" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_codes_are_no_numbers_to_add_to(tmp_path):
    """fp8 weights have their scales beside them: their codes plus ΔW would be nothing."""
    folder = _folder(tmp_path / "base", "llama")
    base = load(folder, device="cpu", dtype="float32")
    adapter = _adapter(base, ["q_proj"])
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    stored = {name: t.to(torch.float8_e4m3fn) if "q_proj" in name else t for name, t in stored.items()}
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"q_proj\.weight is stored as float8_e4m3fn"):
        write_merged(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    codes = {"codes": torch.zeros(10_000, dtype=torch.uint8), "norm": torch.zeros(3, dtype=torch.bfloat16)}
    (tmp_path / "coded").mkdir()
    save_file(codes, tmp_path / "coded" / "model.safetensors")
    assert _usual_dtype(stored_weights(tmp_path / "coded")) == torch.bfloat16


def test_what_cannot_be_done_is_refused_and_leaves_nothing(tmp_path, llama_folder):
    base = load(llama_folder, device="cpu", dtype="float32")
    adapter = _adapter(base, ["q_proj"])
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="there exists already and is never overwritten"):
        write_merged(base, adapter, tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        write_merged(base, adapter, tmp_path / "file" / "merged")
    other = load(save_base(tmp_path / "other", "gpt2"), device="cpu", dtype="float32")
    with pytest.raises(AdapterError, match="does not fit"):
        write_merged(other, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "there"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell where files are mapped")
def test_merging_takes_little_more_memory_than_the_open_base(tmp_path):
    """In a process of its own: how far writing and checking raise its high-water mark, beside the base's files."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 512}
    config = transformers.LlamaConfig(num_attention_heads=8, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from deltaw.adapter import LoraSpec, choose, new_adapter\n"
        "from deltaw.base.load import load\n"
        "from deltaw.base.save import check_merged, write_merged\n"
        "from deltaw.hardware import peak_rss_bytes\n"
        "folder, spec = Path(sys.argv[1]), LoraSpec(rank=1)\n"
        "base = load(folder / 'base', device='cpu', dtype='float32')\n"
        "adapter, before = new_adapter(choose(base.model, spec), spec), peak_rss_bytes()\n"
        "write_merged(base, adapter, folder / 'merged')\n"
        "check_merged(folder / 'base', adapter, folder / 'merged')\n"
        "print(peak_rss_bytes() - before, base.weight_bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    raised, stored = map(int, done.stdout.split())
    assert raised < stored / 2, (raised, stored)
