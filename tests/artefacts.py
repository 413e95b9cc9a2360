"""Hostile files made by hand, each given to the reader that would meet it; prints what came of all as one line of JSON.

One process imports everything, then forks once to make an artefact and once more to read it, with an address-space
limit, a clock, a watch on audit events and a canary file that no code of an artefact may write. `REFUSED` must end in an
error of deltaw's own; `HARMLESS` is read as if the hostile part were not there. Usage: python tests/artefacts.py [NAME ...]
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import safetensors.torch
import torch
from cases import drawn
from models import CHAT_TEMPLATE, byte_tokenizer, save_base
from torch import nn

from deltaw.adapter import LoraSpec, choose, new_adapter, read_adapter, write_adapter
from deltaw.adapter.files import CONFIG, MANIFEST, WEIGHTS
from deltaw.base.gguf_header import check_gguf
from deltaw.base.load import check_folder, load
from deltaw.base.locate import open_tokenizer
from deltaw.data.chat import Encoder
from deltaw.data.formats import Row, read_rows
from deltaw.data.source import Fault
from deltaw.errors import DataError, DeltawError
from deltaw.hardware import tune_memory

PREFIX = "base_model.model."
A, B = PREFIX + "q_proj.lora_A.weight", PREFIX + "q_proj.lora_B.weight"
SECONDS, LIMIT_BYTES = 5, 3 << 30
RUNS_CODE = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
             "socket.getaddrinfo", "socket.bind", "ctypes.dlopen", "webbrowser.open", "urllib.Request")  # fmt: skip
LOADS_CODE = ("exec", "compile", "import", "marshal.loads")
Make = Callable[[Path], None]
GOOD: dict[str, Path] = {}


class Bomb:
    """A pickle that writes the canary file when it is read."""

    def __reduce__(self) -> Any:
        return Path.touch, (GOOD["canary"],)


# -- adapters: files ---------------------------------------------------------------------------------------------------


def write(name: str, content: bytes | str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def link(name: str, target: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def fifo(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link_to_fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    link(WEIGHTS, "pipe")(folder)


def directory(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def sparse(name: str, size: int) -> Make:
    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return make


def only(name: str, content: bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)

    return make


def pickled() -> bytes:
    return pickle.dumps({A: Bomb()})


def torch_archive(folder: Path) -> None:
    torch.save({A: torch.ones(2, 6), "bomb": Bomb()}, folder / WEIGHTS)


def zipped(folder: Path) -> None:
    inner = (folder / WEIGHTS).read_bytes()
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("../../escaped.safetensors", inner)


def replaced_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("an adapter")


def replaced_by_loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


# -- adapters: the header of safetensors -------------------------------------------------------------------------------


def raw(header: bytes | str, data: bytes = b"", length: int | None = None) -> Make:
    """A safetensors file with this header, and a length that may lie."""
    content = header.encode() if isinstance(header, str) else header
    return write(WEIGHTS, struct.pack("<Q", len(content) if length is None else length) + content + data)


def entry(shape: Any, offsets: Any, dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def pair(first: str, second: str, data_bytes: int = 80, more: str = "") -> Make:
    """A header of A [2, 6] and B [4, 2] as given: 48 and 32 bytes of numbers."""
    return raw(f'{{"{A}":{first},"{B}":{second}{more}}}', bytes(data_bytes))


A_ENTRY, B_ENTRY = entry([2, 6], [0, 48]), entry([4, 2], [48, 80])


def many(count: int, shape: str, step: int = 0) -> Make:
    """As many tensors as that, which lie in one place or one after the other."""

    def make(folder: Path) -> None:
        items = (
            f'"{PREFIX}m{n}.lora_A.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[{n * step},{(n + 1) * step}]}}'
            for n in range(count)
        )
        raw("{" + ",".join(items) + "}", bytes(count * step))(folder)

    return make


# -- adapters: tensors -------------------------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Make:
    def make(folder: Path) -> None:
        held = safetensors.torch.load((folder / WEIGHTS).read_bytes())
        change(held)
        (folder / WEIGHTS).write_bytes(safetensors.torch.save({k: t.contiguous() for k, t in held.items()}))

    return make


def converted(**dtypes: torch.dtype) -> Make:
    return tensors(lambda held: held.update({key: held[key].to(dtype) for key in held for dtype in dtypes.values()}))


def put(key: str, value: Callable[[], torch.Tensor]) -> Make:
    return tensors(lambda held: held.update({key: value()}))


def renamed(change: Callable[[str], str]) -> Make:
    def make(held: dict[str, torch.Tensor]) -> None:
        moved = {change(key): held.pop(key) for key in sorted(held)}
        held.update(moved)

    return tensors(make)


def named(module: str) -> Make:
    """The factors of q_proj under another name of the module."""
    return renamed(lambda key: key.replace("q_proj", module))


def without(part: str) -> Make:
    return tensors(lambda held: [held.pop(key) for key in sorted(held) if part in key])


def spoiled(value: float) -> Make:
    return tensors(lambda held: held[B].view(-1)[:1].fill_(value))


# -- adapters: config and manifest -------------------------------------------------------------------------------------


def config(**changes: Any) -> Make:
    return edited(CONFIG, **changes)


def edited(name: str, **changes: Any) -> Make:
    def make(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return make


def config_text(old: str, new: str) -> Make:
    """The config as text, with one piece exchanged: what no JSON writer would write."""

    def make(folder: Path) -> None:
        text = json.dumps(json.loads((folder / CONFIG).read_text()))
        assert old in text, old
        (folder / CONFIG).write_text(text.replace(old, new, 1))

    return make


def manifest(content: bytes | str) -> Make:
    def make(folder: Path) -> None:
        with_manifest(folder)
        write(MANIFEST, content)(folder)

    return make


def manifest_with(**changes: Any) -> Make:
    def make(folder: Path) -> None:
        with_manifest(folder)
        edited(MANIFEST, **changes)(folder)

    return make


def with_manifest(folder: Path) -> None:
    shutil.copyfile(GOOD["adapter"] / MANIFEST, folder / MANIFEST)


def lying(name: str, change: Make) -> Make:
    """A file changed under the manifest of the one before."""
    assert name in (WEIGHTS, CONFIG)

    def make(folder: Path) -> None:
        with_manifest(folder)
        change(folder)

    return make


def both(*changes: Make) -> Make:
    def make(folder: Path) -> None:
        for change in changes:
            change(folder)

    return make


DEEP = "[" * 100_000 + "]" * 100_000
REGEX = "(([a-z0-9_.]+)+)+!"

ADAPTERS: dict[str, Make] = {
    # what stands where the weights should
    "a pickle and nothing else": only("adapter_model.bin", b"\x80\x04."),
    "a pickle renamed to safetensors": lambda folder: write(WEIGHTS, pickled())(folder),
    "an archive of torch renamed to safetensors": torch_archive,
    "a zip with a path outside renamed to safetensors": zipped,
    "a numpy file renamed to safetensors": write(WEIGHTS, b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}"),
    "an index of shards and no weights": only("adapter_model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'),
    "a directory named as the weights": directory(WEIGHTS),
    "weights that are a link to /dev/zero": link(WEIGHTS, "/dev/zero"),
    "weights that are a link to the memory of the process": link(WEIGHTS, "/proc/self/mem"),
    "weights that are a link to a pipe": link_to_fifo,
    "weights that are a pipe": fifo(WEIGHTS),
    "weights that are a link to themselves": link(WEIGHTS, WEIGHTS),
    "weights that are a link to a text outside": link(WEIGHTS, "/etc/passwd"),
    "weights of no bytes": write(WEIGHTS, b""),
    "weights of seven bytes": write(WEIGHTS, b"\x01" * 7),
    "four gigabytes of nothing as weights": sparse(WEIGHTS, 4 << 30),
    "a file instead of the folder": replaced_by_file,
    "a folder that is a link to itself": replaced_by_loop,
    # the header of the weights
    "a header longer than the file": raw("{}", length=1 << 20),
    "a header of 2^63 bytes": raw("{}", length=1 << 63),
    "a header of 2^64 - 1 bytes": raw("{}", length=(1 << 64) - 1),
    "a header of no bytes": raw(""),
    "a header that is no JSON": raw("{'a': 1}"),
    "a header that is a list": raw("[]"),
    "a header that is a number": raw("7" * 9),
    "a header that is not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "a header after a byte-order mark": raw(b"\xef\xbb\xbf{}"),
    "a header nested 100,000 deep": raw('{"a":' + DEEP + "}"),
    "a header with a number of 5,000 digits": pair(A_ENTRY.replace("[2, 6]", "[" + "9" * 5000 + "]"), B_ENTRY),
    "a header of a million tensors without numbers": many(1_000_000, "[0]"),
    "a header of 90,000 tensors without numbers": many(90_000, "[0]"),
    "a header of 60,000 tensors": many(60_000, "[1]", 4),
    "a key twice in the header": pair(A_ENTRY, B_ENTRY, more=f',"{A}":{A_ENTRY}'),
    "tensors that overlap": pair(A_ENTRY, entry([4, 2], [40, 72])),
    "a hole between tensors": pair(A_ENTRY, entry([4, 2], [52, 84]), 84),
    "offsets the wrong way round": pair(entry([2, 6], [48, 0]), B_ENTRY),
    "negative offsets": pair(entry([2, 6], [-48, 0]), B_ENTRY),
    "offsets that are no whole numbers": pair(entry([2, 6], [0.0, 48.5]), B_ENTRY),
    "offsets past the end": pair(A_ENTRY, entry([4, 2], [1 << 40, (1 << 40) + 32])),
    "one offset": pair(entry([2, 6], [0]), B_ENTRY),
    "offsets that are null": pair(entry([2, 6], None), B_ENTRY),
    "a dtype that is unknown": pair(entry([2, 6], [0, 48], "F33"), B_ENTRY),
    "a dtype that is a list": pair(entry([2, 6], [0, 48]).replace('"F32"', "[]"), B_ENTRY),
    "a negative shape": pair(entry([-2, -6], [0, 48]), B_ENTRY),
    "a shape of 2^63": pair(entry([1 << 63], [0, 48]), B_ENTRY),
    "a shape whose product overflows to the right one": pair(entry([1 << 33, 1 << 31, 12], [0, 48]), B_ENTRY),
    "a shape of a hundred thousand dimensions": pair(entry([1] * 100_000, [0, 48]), B_ENTRY),
    "a shape that is a text": pair(entry("26", [0, 48]), B_ENTRY),
    "a shape larger than its bytes": pair(entry([200_000, 600_000], [0, 48]), B_ENTRY),
    "a tensor that is null": pair("null", B_ENTRY),
    "fewer bytes than the header says": pair(A_ENTRY, B_ENTRY, 79),
    "more bytes than the header says": pair(A_ENTRY, B_ENTRY, 4096),
    "metadata that is no text": pair(A_ENTRY, B_ENTRY, more=',"__metadata__":{"a":[1]}'),
    # the tensors
    "no tensors": tensors(dict.clear),
    "a NaN": spoiled(float("nan")),
    "an infinity": spoiled(float("inf")),
    "a tensor without numbers": put(A, lambda: torch.zeros(0, 6)),
    "int8 factors": converted(all=torch.int8),
    "fp8 factors": converted(all=torch.float8_e4m3fn),
    "complex factors": converted(all=torch.complex64),
    "factors of truth values": converted(all=torch.bool),
    "double-precision factors": converted(all=torch.float64),
    "a vector for a factor": put(A, lambda: torch.zeros(12)),
    "a factor of one number without dimensions": put(A, lambda: torch.zeros(())),
    "a factor of ten dimensions": put(A, lambda: torch.zeros([1] * 10)),
    "a transposed factor": put(A, lambda: torch.zeros(6, 2)),
    "a rank other than the config's": both(put(A, lambda: torch.zeros(3, 6)), put(B, lambda: torch.zeros(4, 3))),
    "no A": without("lora_A"),
    "no B": without("lora_B"),
    "one half of one pair missing": tensors(lambda held: held.pop(B)),
    "A of an embedding with B of a layer": renamed(lambda key: key.replace("q_proj.lora_A.weight", "q_proj.lora_embedding_A")),
    "a magnitude without DoRA": put(PREFIX + "q_proj.lora_magnitude_vector", lambda: torch.ones(4)),
    "an unknown tensor": put(PREFIX + "q_proj.lora_C.weight", lambda: torch.ones(2)),
    "a bias": put(PREFIX + "q_proj.lora_B.bias", lambda: torch.ones(4)),
    "no prefix": renamed(lambda key: key.removeprefix(PREFIX)),
    "keys of a compiled model": renamed(lambda key: key.replace(PREFIX, PREFIX + "_orig_mod.")),
    "nested factors": renamed(lambda key: key.replace("q_proj", "q_proj.base_layer")),
    "a name that climbs out of a folder": named("../../../etc/passwd"),
    "a name that is an absolute path": named("/etc/passwd"),
    "a name with NUL": named("q\x00proj"),
    "a name with a line break and an escape sequence": named("q\n\x1b[2Jproj"),
    "a name with dots of another alphabet": named("layers․0．q_proj"),
    "a name written from right to left": named("q_\u202eproj"),
    "a name of 100,000 characters": named("q" * 100_000),
    "a name 1,000 deep": named("q." * 999 + "q"),
    "an empty name": renamed(lambda key: key.replace("q_proj.", "")),
    "a name with an empty part": named("layers..q_proj"),
    "a name that starts with a dot": named(".q_proj"),
    # the config
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "a directory named as the config": directory(CONFIG),
    "a config that is a link to /dev/zero": link(CONFIG, "/dev/zero"),
    "a config that is a link to the memory of the process": link(CONFIG, "/proc/self/mem"),
    "a config that is a pipe": fifo(CONFIG),
    "a config that is a link to itself": link(CONFIG, CONFIG),
    "a config that is a link to a text outside": link(CONFIG, "/etc/passwd"),
    "a config of no bytes": write(CONFIG, b""),
    "a config of four gigabytes": sparse(CONFIG, 4 << 30),
    "a config of two megabytes of spaces": write(CONFIG, b" " * (2 << 20) + b"{}"),
    "a config nested 100,000 deep": write(CONFIG, DEEP),
    "a setting nested 100,000 deep": config_text('"peft_type"', f'"deep": {DEEP}, "peft_type"'),
    "a config that is a list": write(CONFIG, "[]"),
    "a config that is a number": write(CONFIG, "1e9"),
    "a config that is null": write(CONFIG, "null"),
    "a config that is a text": write(CONFIG, '"LORA"'),
    "a config that is not UTF-8": write(CONFIG, b'{"peft_type": "\xff\xfe"}'),
    "a config after a byte-order mark": config_text("{", "\ufeff{"),
    "a config in UTF-16": lambda folder: write(CONFIG, (folder / CONFIG).read_text().encode("utf-16"))(folder),
    "a setting twice in the config": config_text('"r": 2', '"r": 64, "r": 2'),
    "a number of 5,000 digits in the config": config_text('"r": 2', '"r": ' + "2" * 5000),
    "rank 10^9": config(r=10**9),
    "rank -1": config(r=-1),
    "rank 0": config(r=0),
    "rank true": config(r=True),
    "rank 1e308": config(r=1e308),
    "rank as a text": config(r="2"),
    "rank null": config(r=None),
    "alpha NaN": config(lora_alpha=float("nan")),
    "alpha infinite": config_text('"lora_alpha": 4', '"lora_alpha": 1e999'),
    "alpha negative": config(lora_alpha=-4),
    "alpha 1e308": config(lora_alpha=1e308),
    "alpha of 400 digits": config(lora_alpha=10**400),
    "alpha as a list": config(lora_alpha=[4]),
    "dropout 1": config(lora_dropout=1.0),
    "dropout NaN": config(lora_dropout=float("nan")),
    "an endless regular expression in rank_pattern": config(rank_pattern={REGEX: 2}),
    "an endless regular expression in alpha_pattern": config(alpha_pattern={REGEX: 2}),
    "20,000 rank patterns over 2,000 layers": both(
        config(rank_pattern={f"layers.{n}.q_proj": 2 for n in range(20_000)}),
        tensors(lambda held: held.update({key.replace("q_proj", f"m{n}.v"): held[key].clone() for key in (A, B) for n in range(2_000)})),
        spoiled(float("nan")),
    ),
    "a rank pattern that is a list": config(rank_pattern=[["q_proj", 2]]),
    "a rank pattern with rank true": config(rank_pattern={"q_proj": True}),
    "an alpha pattern with NaN": config(alpha_pattern={"q_proj": float("nan")}),
    "target_modules that is a number": config(target_modules=7),
    "target_modules that holds a number": config(target_modules=["q_proj", 7]),
    "target_modules that is an object": config(target_modules={"q_proj": 1}),
    "30,000 target_parameters over 2,000 layers": both(
        config(target_parameters=[f"layers.{n}.q_proj.weight" for n in range(30_000)]),
        tensors(lambda held: held.update({key.replace("q_proj", f"m{n}.v"): held[key].clone() for key in (A, B) for n in range(2_000)})),
    ),
    "target_parameters that is a text": config(target_parameters=REGEX),
    "use_rslora as the text false": config(use_rslora="false"),
    "fan_in_fan_out as a number": config(fan_in_fan_out=2),
    "use_dora without magnitudes": config(use_dora=True),
    "another kind of adapter": config(peft_type="IA3"),
    "a kind of adapter that is an object": config(peft_type={"LORA": 1}),
    "whole modules to save": config(modules_to_save=["lm_head"]),
    "a trained bias": config(bias="all"),
    "layers copied a million times": config(layer_replication=[[0, 10**6]]),
    "a start that edits the base": config(init_lora_weights="pissa_niter_16"),
    "an unknown setting with a module name": config(custom_code="os.system"),
    "a setting named as an attribute": config(__class__="dict"),
    "a code module of megatron": config(megatron_config={"core": "os"}),
    # the manifest
    "a manifest of other weights": lying(WEIGHTS, put(A, lambda: torch.zeros(2, 6))),
    "a manifest of another config": lying(CONFIG, config(lora_alpha=800)),
    "a manifest that is a list": manifest("[]"),
    "a manifest that is a number": manifest("7"),
    "a manifest nested 100,000 deep": manifest(DEEP),
    "a manifest of four gigabytes": both(with_manifest, sparse(MANIFEST, 4 << 30)),
    "a manifest that is not UTF-8": manifest(b'{"\xff": 1}'),
    "a manifest after a byte-order mark": manifest(b"\xef\xbb\xbf{}"),
    "a manifest with a key twice": manifest('{"format": 1, "format": 1, "origin": {}, "sha256": {}}'),
    "a manifest of an unknown format": manifest_with(format=2),
    "a manifest with unknown keys": manifest_with(run="os.system"),
    "a manifest without digests": manifest_with(sha256={}),
    "a manifest whose digests are a list": manifest_with(sha256=[1, 2]),
    "a manifest whose digests are null": manifest_with(sha256={CONFIG: None, WEIGHTS: None}),
    "a manifest with digests of files outside": manifest_with(sha256={"../../secret": "0", CONFIG: "0", WEIGHTS: "0"}),
    "a manifest whose origin is a text": manifest_with(origin="nowhere"),
    "a directory named as the manifest": directory(MANIFEST),
    "a manifest that is a pipe": fifo(MANIFEST),
    "a manifest that is a link to /dev/zero": link(MANIFEST, "/dev/zero"),
    "a manifest that is a link to itself": link(MANIFEST, MANIFEST),
}  # fmt: skip


# -- bases -------------------------------------------------------------------------------------------------------------


def base_config(**changes: Any) -> Make:
    return edited("config.json", **changes)


def code(folder: Path) -> None:
    """Python files beside the model that write the canary as soon as they are imported."""
    text = f"open({str(GOOD['canary'])!r}, 'w')\nclass C: pass\n"
    for name in ("canary.py", "modeling_llama.py", "tokenization_llama.py", "__init__.py", "tokenizer.py", "setup.py"):
        (folder / name).write_text(text)


def auto_map(names: tuple[str, ...] = ("AutoConfig", "AutoModelForCausalLM")) -> dict[str, Any]:
    return dict.fromkeys(names, "canary.C")


def base_index(places: str) -> Make:
    """Weights said to lie somewhere else."""

    def make(folder: Path) -> None:
        names = list(safetensors.torch.load((folder / "model.safetensors").read_bytes()))
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, places)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return make


def base_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled())


BASES: dict[str, Make] = {
    "a base of pickles only": base_pickle,
    "a base whose weights are a renamed pickle": lambda folder: write("model.safetensors", pickled())(folder),
    "a base with an unknown type and code of its own": both(code, base_config(model_type="songbird", auto_map=auto_map())),
    "a base whose type is a path": base_config(model_type="../../../canary"),
    "a base whose type is a list": base_config(model_type=["llama"]),
    "a base that is no language model": base_config(model_type="vit"),
    "a base config that is a list": write("config.json", "[]"),
    "a base config that is a number": write("config.json", "7"),
    "a base config nested 100,000 deep": write("config.json", DEEP),
    "a base config of four gigabytes": sparse("config.json", 4 << 30),
    "a base config that is not UTF-8": write("config.json", b'{"model_type": "\xff"}'),
    "a base config after a byte-order mark": write("config.json", b'\xef\xbb\xbf{"model_type": "llama"}'),
    "a base config with a number of 5,000 digits": write("config.json", '{"model_type": "llama", "n": ' + "9" * 5000 + "}"),
    "a base config that is a pipe": fifo("config.json"),
    "a base config that is a link to /dev/zero": link("config.json", "/dev/zero"),
    "a base config that is a link to itself": link("config.json", "config.json"),
    "a base config that is a link to the memory of the process": link("config.json", "/proc/self/mem"),
    "a base with a quantization of unknown class": base_config(quantization_config={"quant_method": "os.system"}),
    "a base with a quantization without a method": base_config(quantization_config={"load_in": "../x"}),
    "a base whose quantization is a list": base_config(quantization_config=["bitsandbytes"]),
    "a base whose attention is code from the hub": base_config(_attn_implementation="somebody/kernel"),
    "a base whose attention is code from the hub, under its other name": base_config(attn_implementation="somebody/kernel:run"),
    "a base of a million layers": base_config(num_hidden_layers=10**6),
    "a base of 10^12 units": base_config(hidden_size=10**12),
    "a base of 10^12 tokens": base_config(vocab_size=10**12),
    "a base with heads of 10^12": base_config(head_dim=10**12),
    "a base of minus two layers": base_config(num_hidden_layers=-2),
    "a base with a width that is a text": base_config(hidden_size="wide"),
    "a base with no heads": base_config(num_attention_heads=0),
    "a base with an unknown activation": base_config(hidden_act="os.system"),
    "a base whose dtype is a function": base_config(dtype="save"),
    "a base with an unknown rope": base_config(rope_parameters={"rope_type": "../x", "rope_theta": 1e4}),
    "an adapter beside a base": write("adapter_config.json", '{"base_model_name_or_path": "somebody/else"}'),
    "a base whose index points outside": base_index("../../../etc/passwd"),
    "a base whose index points at a pickle": both(base_index("model.bin"), lambda folder: write("model.bin", pickled())(folder)),
    "a base whose index is a list": both(base_index("x"), write("model.safetensors.index.json", "[]")),
    "a base with half of its weights": lambda folder: _halve(folder / "model.safetensors"),
    "a base without a tokenizer": lambda folder: [path.unlink() for path in folder.glob("token*")] and None,
    "a tokenizer nested 100,000 deep": write("tokenizer.json", DEEP),
    "a tokenizer that is a list": write("tokenizer.json", "[]"),
    "a tokenizer of four gigabytes": sparse("tokenizer.json", 4 << 30),
    "a tokenizer whose class is a path": both(
        code, lambda folder: (folder / "tokenizer.json").unlink(),
        edited("tokenizer_config.json", tokenizer_class="../canary", auto_map={"AutoTokenizer": ["canary.C", "canary.C"]}),
    ),
    "a tokenizer config that is a list": write("tokenizer_config.json", "[]"),
}  # fmt: skip


def _halve(path: Path) -> None:
    held = safetensors.torch.load(path.read_bytes())
    kept = {key: held[key].clone() for key in sorted(held)[::2]}
    path.write_bytes(safetensors.torch.save(kept, {"format": "pt"}))


# -- templates, data, GGUF ---------------------------------------------------------------------------------------------

TEMPLATES = {
    "a template that reaches for python's classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a template that reaches for globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "a template that formats an attribute": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a template that includes a file": "{% include '/etc/passwd' %}",
    "a template that builds a gigabyte": "{{ 'a' * 10**9 }}",
    "a template that loops for ever": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


def template(text: str) -> Make:
    return write("chat_template.jinja", text)


ROWS = {
    "a row nested 100,000 deep": '{"prompt": ' + DEEP + ', "completion": "x"}',
    "a row with a number of 5,000 digits": '{"prompt": ' + "9" * 5000 + ', "completion": "x"}',
    "a row that is not UTF-8": b'{"prompt": "\xff", "completion": "x"}',
    "a row whose messages are numbers": '{"messages": [1, 2]}',
    "a row whose role is an object": '{"messages": [{"role": {}, "content": "x"}]}',
    "a row of half a surrogate": '{"prompt": "\\ud800", "completion": "x"}',
    "a pickle renamed to jsonl": b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00.",
}


def gguf(kv: bytes = b"", num_tensors: int = 0, num_keys: int = 0, magic: bytes = b"GGUF", version: int = 3) -> Make:
    return write("base.gguf", magic + struct.pack("<IQQ", version, num_tensors, num_keys) + kv)


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


TENSOR = text(b"a") + struct.pack("<I", 2)
GGUFS: dict[str, Make] = {
    "a GGUF with another magic": gguf(magic=b"PK\x03\x04"),
    "a GGUF of an unknown version": gguf(version=99),
    "a GGUF of 2^63 tensors": gguf(num_tensors=1 << 63, kv=bytes(99)),
    "a GGUF of 2^63 keys": gguf(num_keys=1 << 63, kv=bytes(99)),
    "a GGUF with a key of 2^63 characters": gguf(text(b"a", 1 << 63) + bytes(99), num_keys=1),
    "a GGUF with an array of 2^60 texts": gguf(text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(99), num_keys=1),
    "a GGUF with arrays in arrays": gguf(text(b"a") + struct.pack("<IIQ", 9, 9, 1) * 9, num_keys=1),
    "a GGUF with a key twice": gguf((text(b"a") + struct.pack("<IB", 0, 1)) * 2, num_keys=2),
    "a GGUF with a name that is not UTF-8": gguf(text(b"\xff") + struct.pack("<IB", 0, 1) + bytes(9), num_keys=1),
    "a GGUF with a tensor of 2^60 by 2^60": gguf(TENSOR + struct.pack("<QQIQ", 1 << 60, 1 << 60, 0, 0) + bytes(99), 1),
    "a GGUF with a tensor of 4,000,000,000 dimensions": gguf(
        text(b"a") + struct.pack("<I", 4_000_000_000) + bytes(99), 1
    ),
    "a GGUF that ends in its header": gguf(num_keys=1, kv=b"\x01"),
}

# -- what is read although something hostile lies in it ----------------------------------------------------------------

HARMLESS: dict[str, Make] = {
    "an endless regular expression in target_modules": config(target_modules=REGEX),
    "an endless regular expression in exclude_modules": config(exclude_modules=REGEX),
    "an endless regular expression in layers_pattern": config(layers_pattern=REGEX, layers_to_transform=[0]),
    "a pickle beside the weights": lambda folder: write("adapter_model.bin", pickled())(folder),
    "a module to import in auto_mapping": config(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
    "a base that is a path outside": config(base_model_name_or_path="../../../etc/passwd"),
    "a base that is an address": config(base_model_name_or_path="http://127.0.0.1:1/x", revision="../../x"),
    "a start named as code": config(init_lora_weights="__import__('os').system('true')"),
    "a config of a cache for LoRA-GA": config(lora_ga_config={"cache_file": "/etc/passwd"}),
    "code beside the adapter": lambda folder: code(folder),
    "weights that are a link as in the hub's cache": lambda folder: _linked(folder / WEIGHTS),
}
HARMLESS_BASES: dict[str, Make] = {
    "code of its own for a base of a known type": both(lambda folder: code(folder), base_config(auto_map=auto_map())),
    "code of its own for a tokenizer of a known type": both(
        lambda folder: code(folder), edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["canary.C", "canary.C"]})
    ),
    "pickles beside the weights of a base": lambda folder: write("pytorch_model.bin", pickled())(folder),
    "pipelines and code for generation": both(
        lambda folder: code(folder), base_config(custom_pipelines={"x": {"impl": "canary.C"}}),
        write("generation_config.json", '{"custom_generate": "."}'),
    ),
}  # fmt: skip


def _linked(path: Path) -> None:
    blob = path.parent.parent / "blob"
    shutil.copyfile(path, blob)
    path.unlink()
    path.symlink_to(blob)


# -- readers -----------------------------------------------------------------------------------------------------------


def read_base(folder: Path) -> None:
    check_folder(folder)
    load(folder, dtype="float32")


def read_template(folder: Path) -> None:
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    found = Encoder(open_tokenizer(folder), 256).encode(Row("a", 1, chat))
    if isinstance(found, Fault):
        raise DataError(str(found))


def read_data(folder: Path) -> None:
    """Rows are refused one by one; a refused row is an error here."""
    encoder = Encoder(byte_tokenizer(), 256)
    for row in read_rows([folder / "rows.jsonl"]):
        found = row if isinstance(row, Fault) else encoder.encode(row)
        if isinstance(found, Fault):
            raise DataError(str(found))


Artefact = tuple[str, Make, Callable[[Path], Any]]


def _all() -> dict[str, Artefact]:
    """{name: (which good folder it starts from, how it is made, who reads it)}."""
    found: dict[str, Artefact] = {name: ("adapter", make, read_adapter) for name, make in (ADAPTERS | HARMLESS).items()}
    found |= {name: ("base", make, read_base) for name, make in (BASES | HARMLESS_BASES).items()}
    found |= {name: ("base", template(source + CHAT_TEMPLATE), read_template) for name, source in TEMPLATES.items()}
    found |= {name: ("nothing", write("rows.jsonl", content), read_data) for name, content in ROWS.items()}
    found |= {name: ("nothing", make, lambda folder: check_gguf(folder / "base.gguf")) for name, make in GGUFS.items()}
    return found


# -- running -----------------------------------------------------------------------------------------------------------


def _in_fork(act: Callable[[], dict[str, Any]], seconds: float) -> tuple[dict[str, Any], float, int]:
    """(what the child reported, its seconds, the kilobytes that it took beyond those it was born with)."""
    reader, writer = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.write(writer, f"{_resident_kb()}\n".encode())
        signal.alarm(int(seconds))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        report = {}
        try:
            report = act()
        except BaseException as error:
            report = {"outcome": "crashed", "says": f"{type(error).__name__}: {error}"[:300]}
        finally:
            os.write(writer, json.dumps(report).encode()[: 1 << 15])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        born_kb, content = int(file.readline()), file.read()
    _, status, usage = os.wait4(child, 0)
    taken = time.monotonic() - started
    code_ = os.waitstatus_to_exitcode(status)
    report = json.loads(content) if content else {"outcome": "killed", "says": f"exit code {code_}"}
    return report, taken, max(0, usage.ru_maxrss - born_kb)


def _resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * (resource.getpagesize() // 1024)


def _read(read: Callable[[Path], Any], folder: Path, strict: bool) -> dict[str, Any]:
    """What the reader makes of the folder, and what it did that it must not."""
    events: list[str] = []
    watching = True
    inside = str(folder.parent)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event in RUNS_CODE or (strict and event in LOADS_CODE):
            events.append(event)
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(inside):
            events.append(f"exec of {arguments[0].co_filename}")
        elif event == "open" and strict and not str(os.fsdecode(arguments[0])).startswith(inside):
            events.append(f"open {arguments[0]}")

    tune_memory()  # the C library is asked once in a process
    started, used = time.monotonic(), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (_address_bytes() + LIMIT_BYTES, resource.RLIM_INFINITY))
    sys.addaudithook(watch)
    value = None
    try:
        value = read(folder)
        report: dict[str, Any] = {"outcome": "accepted"}
    except DeltawError as error:
        report = {"outcome": "refused", "error": type(error).__name__, "says": str(error)[:300]}
    watching = False
    times = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - used}
    same = {} if value is None else {"same": _same(value)}
    return report | times | same | {"events": sorted(set(events))}


def _same(adapter: Any) -> bool:
    """Whether it has the factors of the good adapter, bit for bit."""
    wanted = {(name, part): tensor for name, part, tensor in read_adapter(GOOD["adapter"]).tensors()}
    found = {(name, part): tensor for name, part, tensor in adapter.tensors()}
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def _address_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def prepare(folder: Path) -> None:
    """The good folders from which each artefact starts; reading them once imports what is imported late."""
    os.environ["DELTAW_CACHE"] = str(folder / "cache")
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("q_proj", "v_proj"):
        model.add_module(name, nn.Linear(6, 4))
    spec = LoraSpec(rank=2, alpha=4)
    write_adapter(drawn(new_adapter(choose(model, spec), spec)), folder / "adapter")
    save_base(folder / "base")
    (folder / "nothing").mkdir()
    GOOD.update({"adapter": folder / "adapter", "base": folder / "base", "nothing": folder / "nothing"})
    GOOD["canary"] = folder / "canary"
    read_adapter(GOOD["adapter"])
    read_base(GOOD["base"])
    read_template(GOOD["base"])


def try_out(name: str, artefact: Artefact, folder: Path) -> dict[str, Any]:
    """Makes one artefact in a folder of its own and gives it to its reader."""
    start, make, read = artefact
    place = folder / "tried" / "artefact"
    shutil.rmtree(place.parent, ignore_errors=True)
    place.parent.mkdir()
    shutil.copytree(GOOD[start], place)
    if start == "adapter":
        (place / MANIFEST).unlink()
    made, _, _ = _in_fork(lambda: {"made": make(place)}, 60)
    assert "made" in made, (name, made)
    report, _, added_kb = _in_fork(partial(_read, read, place, start == "adapter"), SECONDS)
    return report | {"added_mb": round(added_kb / 1024, 1), "canary": GOOD["canary"].exists()}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    artefacts = _all()
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        found = {name: try_out(name, artefacts[name], Path(temporary)) for name in names or artefacts}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
