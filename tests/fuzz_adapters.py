"""Mutated adapter folders against the reader: none may crash it, hang it, run anything, or be taken for what it is not.

Bytes of the files are flipped, cut, doubled and exchanged; the config's values and keys are replaced by what they should
not be; tensors get other shapes, dtypes and numbers. With its manifest, a folder whose content differs must be refused.
Without one, what is accepted must still be an adapter: finite numbers, whole pairs, shapes that its ranks say. Times are
of the processor: on a machine that others use too, a clock measures them.
Usage: python tests/fuzz_adapters.py COUNT [SEED [OUT]]; prints one line of JSON, and writes it to the file OUT if given.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import safetensors.torch
import torch
from cases import drawn
from torch import nn

from deltaw.adapter import Adapter, LoraSpec, choose, new_adapter, read_adapter, write_adapter
from deltaw.adapter.files import CONFIG, MANIFEST, WEIGHTS
from deltaw.errors import AdapterError

FORBIDDEN = ("exec", "compile", "pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system", "os.exec", "os.fork",
             "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "import")  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**70, 1e308, -0.5, "", "q_proj", "(a+)+$", "../../etc/passwd", "\x00", "é" * 999, [],
    [[]], [None], ["q_proj", 5], {}, {"a": {"b": []}}, {"v": 1e400}, {".*": 4}, "__import__('os')", [["a"] * 50] * 50,
]  # fmt: skip


def original(folder: Path) -> Adapter:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("q_proj", "v_proj"):
        model.add_module(name, nn.Linear(6, 4))
    spec = LoraSpec(rank=2, alpha=4, rank_pattern={"v_proj": 1})
    adapter = drawn(new_adapter(choose(model, spec), spec))
    write_adapter(adapter, folder)
    return adapter


def mutate(files: dict[str, bytes], random_: random.Random) -> dict[str, bytes]:
    """One to three changes to the files of a folder."""
    files = dict(files)
    for _ in range(random_.randint(1, 3)):
        change = random_.choice((_bytes, _bytes, _config, _config, _tensors, _files))
        change(files, random_)
    return files


def _bytes(files: dict[str, bytes], random_: random.Random) -> None:
    name = random_.choice(sorted(files))
    content = bytearray(files[name])
    if not content:
        return
    place, way = random_.randrange(len(content)), random_.randrange(5)
    if way == 0:
        content[place] ^= 1 << random_.randrange(8)
    elif way == 1:
        del content[place:]
    elif way == 2:
        content[place:place] = content[place : place + random_.randrange(40)]
    elif way == 3:
        content[place : place + 8] = random_.randbytes(8)
    else:
        content += random_.randbytes(random_.randrange(20))
    files[name] = bytes(content)


def _config(files: dict[str, bytes], random_: random.Random) -> None:
    try:
        config = json.loads(files[CONFIG])
    except (ValueError, KeyError):
        return
    if not isinstance(config, dict) or not config:
        return
    key, way = random_.choice(sorted(config)), random_.randrange(4)
    if way == 0:
        del config[key]
    elif way == 1:
        config[random_.choice(("lora_bias", "auto_mapping", "new_key", "modules_to_save", "__class__"))] = (
            random_.choice(VALUES)
        )
    else:
        config[key] = random_.choice(VALUES)
    files[CONFIG] = json.dumps(config).encode()


def _tensors(files: dict[str, bytes], random_: random.Random) -> None:
    try:
        tensors = safetensors.torch.load(files[WEIGHTS])
    except Exception:  # it is broken already
        return
    if not tensors:
        return
    key, way = random_.choice(sorted(tensors)), random_.randrange(7)
    tensor = tensors.pop(key)
    if way == 1:
        tensors[key] = tensor.T.contiguous()
    elif way == 2:
        tensors[key] = tensor.to(random_.choice((torch.int8, torch.bool, torch.float64, torch.bfloat16)))
    elif way == 3:
        tensors[key] = tensor * float(random_.choice(("nan", "inf", "0")))
    elif way == 4:
        tensors[random_.choice(("_orig_mod.", "module.", "")) + key.replace("lora_A", "lora_B")] = tensor
    elif way == 5:
        tensors[key] = torch.zeros(random_.choice(((0,), (0, 6), (1,), (2, 6, 1), (9, 9))))
    elif way == 6:
        tensors[key + ".weight"] = tensor
    files[WEIGHTS] = safetensors.torch.save(tensors)


def _files(files: dict[str, bytes], random_: random.Random) -> None:
    name, way = random_.choice(sorted(files)), random_.randrange(3)
    if way == 0 and len(files) > 1:
        del files[name]
    elif way == 1:
        files[name] = files[random_.choice(sorted(files))]
    else:
        files[name] = b""


def is_sound(adapter: Adapter) -> bool:
    """Whether it is an adapter at all: whole pairs of finite numbers in the shapes of their ranks."""
    whole = bool(adapter.factors)
    for name, factors in adapter.factors.items():
        rank = adapter.spec.rank_of(name)
        whole &= factors.A.ndim == factors.B.ndim and factors.A.shape[0] == factors.B.shape[1] == rank
        whole &= all(bool(t.isfinite().all()) and t.is_floating_point() for _, t in factors.tensors())
        whole &= 0 < adapter.spec.scale_of(name) < float("inf")
    return whole


def same(one: Adapter, other: Adapter) -> bool:
    left, right = ({(n, p): t for n, p, t in adapter.tensors()} for adapter in (one, other))
    return one.spec.with_(targets=("x",)) == other.spec.with_(targets=("x",)) and left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) for key in left
    )  # fmt: skip


def main(count: int, seed: int = 0, out: Path | None = None) -> None:
    random_, events, found, slowest = random.Random(seed), Counter[str](), Counter[str](), 0.0
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as temporary:
        good, bad = Path(temporary) / "good", Path(temporary) / "bad"
        wanted = original(good)
        content = {name: (good / name).read_bytes() for name in (CONFIG, WEIGHTS, MANIFEST)}
        assert same(read_adapter(good), wanted)
        watching = False

        def watch(event: str, _arguments: Any) -> None:
            if watching and event in FORBIDDEN:
                events[event] += 1

        sys.addaudithook(watch)
        for number in range(count):
            with_manifest = number % 2 == 0
            kept = content if with_manifest else {name: content[name] for name in (CONFIG, WEIGHTS)}
            files = mutate(kept, random_)
            shutil.rmtree(bad, ignore_errors=True)
            bad.mkdir()
            for name, data in files.items():
                (bad / name).write_bytes(data)
            started, watching = time.process_time(), True
            try:
                adapter = read_adapter(bad)
                if files.get(MANIFEST) == content[MANIFEST]:
                    outcome = "equal" if same(adapter, wanted) else "WRONG"
                else:
                    outcome = "sound" if is_sound(adapter) else "WRONG"
            except AdapterError as error:
                outcome = "refused" if str(error) else "WRONG"
            except Exception as error:
                outcome = f"CRASH {type(error).__name__}: {error}"[:120]
            watching = False
            slowest = max(slowest, time.process_time() - started)
            found[outcome] += 1
    result = {"mutated": count, **found, "slowest_cpu_seconds": round(slowest, 3), "forbidden_events": dict(events)}
    if out is not None:
        command = f"python tests/fuzz_adapters.py {count} {seed} {out.name if out.is_absolute() else out}"
        out.write_text(json.dumps({"command": command, **result}, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:3]), *map(Path, sys.argv[3:4]))
