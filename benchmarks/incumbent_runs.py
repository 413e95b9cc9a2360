"""Accidents to a training run, the same for two stacks: Hugging Face Trainer with PEFT, and deltaw.

Both train the same base (two layers, hidden 64), rows, rank, dropout and number of steps, save every five steps, and go
on as their users do: from `get_last_checkpoint` where it finds one, and by `deltaw train --resume`. Everything is
imported once and each attempt is a fork, so kills hit training and not imports. benchmarks/incumbent.py is the command.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import peft
import safetensors.torch
import torch
import transformers
from models import SMALL, byte_tokenizer
from torch import Tensor
from torture import _at_operation as at_operation
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import deltaw.terminal  # noqa: F401 - imported before the forks, as everything that a command needs
from deltaw.cli import main as deltaw_command
from deltaw.engine import train as engine
from deltaw.engine.log import read_metrics

STEPS, SAVE_STEPS, HALF, RANK = 60, 5, 10, 8
PAGE = 4096
Act = Callable[[Tensor], None]


# -- children ----------------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a child ended: exit code (−9 killed, None out of time), what it returned, its last words, time and memory."""

    code: int | None
    value: Any
    said: str
    seconds: float
    added_mb: float


def in_child(act: Callable[[], Any], folder: Path, limit: float = 120, kill_after: float | None = None) -> Ended:
    """`act` in a fork; its return value comes back through a file. A stack's exception is exit code 1, as in Python."""
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    before_kb = _resident_kb()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.manual_seed(0)
            answer.write_text(json.dumps(act()))
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended, status, usage = _wait(child, started + (limit if kill_after is None else kill_after))
    code = os.waitstatus_to_exitcode(status) if ended or kill_after is not None else None
    value = json.loads(answer.read_text()) if answer.is_file() and code == 0 else None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    seconds = time.monotonic() - started
    return Ended(code, value, lines[-1] if lines else "", seconds, max(0, usage.ru_maxrss - before_kb) / 1024)


def _wait(child: int, deadline: float) -> tuple[bool, int, Any]:
    """(whether it ended by itself before the deadline, status, usage); a child that did not is killed."""
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return True, status, usage
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return False, status, usage


def _resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * (resource.getpagesize() // 1024)


# -- the two stacks ----------------------------------------------------------------------------------------------------


def make_ground(folder: Path) -> Path:
    """A folder with a tiny base and 64 chats."""
    config = LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    rows = [
        {"prompt": " ".join(f"w{(7 * n + k) % 23}" for k in range(1 + n % 9)), "completion": f"w{n % 5}"}
        for n in range(64)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class _At(TrainerCallback):
    """Acts on the first lora_B after the given step, and keeps what was logged."""

    def __init__(self, step: int, act: Act) -> None:
        self.step, self.act, self.logged = step, act, []

    def on_step_end(self, _args, state, _control, model=None, **_) -> None:
        if state.global_step == self.step:
            self.act(next(p.data for name, p in model.named_parameters() if "lora_B" in name))

    def on_log(self, _args, state, _control, logs=None, **_) -> None:
        self.logged.append({"step": state.global_step, **(logs or {})})


class Incumbent:
    """Hugging Face Trainer with PEFT, as its example scripts use them."""

    name = "Trainer + PEFT"

    def __init__(self, ground: Path) -> None:
        self.ground = ground

    def train(self, run: Path, at: int = 0, act: Act = lambda _: None, keep: int | None = None) -> dict[str, Any]:
        """Starts, or goes on from the newest checkpoint, and saves the adapter at the end."""
        transformers.set_seed(0)
        torch.use_deterministic_algorithms(True)
        model = AutoModelForCausalLM.from_pretrained(self.ground / "base", dtype=torch.float32)
        lora = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        arguments = TrainingArguments(
            str(run), max_steps=STEPS, save_steps=SAVE_STEPS, logging_steps=SAVE_STEPS, learning_rate=1e-2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, save_total_limit=keep, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        hook = _At(at, act)
        trainer = Trainer(
            peft.get_peft_model(model, lora), arguments, train_dataset=self._rows(), data_collator=_collate,
            callbacks=[hook],
        )  # fmt: skip
        newest = get_last_checkpoint(str(run)) if run.is_dir() else None
        trainer.train(resume_from_checkpoint=newest)
        trainer.save_model(str(run / "final"))
        return {"logged": [line for line in hook.logged if "loss" in line], "steps": trainer.state.global_step}

    def _rows(self) -> list[list[int]]:
        tokenizer = byte_tokenizer()
        rows = map(json.loads, (self.ground / "chats.jsonl").read_text().splitlines())
        return [[*tokenizer(f"{row['prompt']}\n{row['completion']}").input_ids, tokenizer.eos_token_id] for row in rows]

    def adapters(self, run: Path) -> list[Path]:
        """The files of the adapters that a finished run leaves."""
        return [run / "final" / "adapter_model.safetensors"]

    def newest(self, run: Path) -> Path:
        """The newest checkpoint of a run."""
        return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _collate(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Deltaw:
    """The command `deltaw train`, and `deltaw train --resume` where a run has begun."""

    name = "deltaw"

    def __init__(self, ground: Path) -> None:
        self.ground = ground
        os.environ["DELTAW_CACHE"] = str(ground / "cache")

    def train(self, run: Path, at: int = 0, act: Act = lambda _: None, keep: int | None = None) -> dict[str, Any]:
        """Starts, or goes on from the newest checkpoint; what is logged lies in the run's folder."""
        if at:
            _act_at(at, act)
        begun = (run / "config.yaml").is_file()
        if not begun:
            shutil.rmtree(run, ignore_errors=True)
        start = [
            *("--model", str(self.ground / "base"), "--data", str(self.ground / "chats.jsonl"), "--out", str(run)),
            *("--rank", str(RANK), "--alpha", str(RANK), "--dropout", "0.1", "--steps", str(STEPS), "--lr", "1e-2"),
            *("--batch-tokens", "320", "--eval-steps", str(SAVE_STEPS), "--checkpoint-steps", str(SAVE_STEPS)),
            *("--device", "cpu", "--dtype", "float32", "--threads", "1", "--keep-checkpoints", str(keep or 2)),
        ]
        deltaw_command(
            ["train", *(["--resume", str(run)] if begun else start)], prog_name="deltaw", standalone_mode=True
        )
        return {}

    def adapters(self, run: Path) -> list[Path]:
        """The files of the adapters that a finished run leaves."""
        return [run / part / "adapter_model.safetensors" for part in ("adapter", "last")]

    def newest(self, run: Path) -> Path:
        """The newest checkpoint of a run."""
        return max((run / "checkpoints").glob("*.ckpt"))


def _act_at(step: int, act: Act) -> None:
    """Acts on the first B right after the update of the given step."""
    probe = engine.probe

    def probe_then_watch(trainer: engine.Trainer) -> None:
        probe(trainer)
        place = next(place for place in trainer.flat.places if place.part == "B")
        trainer.flat.optimizer.register_step_post_hook(
            lambda *_: act(trainer.flat.master[place.start : place.stop]) if trainer.progress.step + 1 == step else None
        )

    engine.probe = probe_then_watch


Stack = Incumbent | Deltaw


class Ground:
    """One stack with its undisturbed run, and a copy of a run that died after step 12 (checkpoints 5 and 10)."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        folder.mkdir()
        ended = self.attempt("straight")
        assert ended.code == 0, ended.said
        self.wanted = self.result("straight")
        self.seconds = self.attempt("again").seconds  # the first one fills caches
        assert self.result("again") == self.wanted, "a run that nobody disturbs must repeat itself"
        ended = self.attempt("half", at=HALF + 2, act=lambda _: os.kill(os.getpid(), signal.SIGKILL))
        assert ended.code == -9 and self.stack.newest(folder / "half").exists(), ended

    def attempt(self, name: str, kill_after: float | None = None, **options: Any) -> Ended:
        """A child that trains the run of this name, or goes on with it."""
        return in_child(lambda: self.stack.train(self.folder / name, **options), self.folder, 120, kill_after)

    def result(self, name: str) -> list[bytes]:
        """The bytes of the adapters of a finished run."""
        return [file.read_bytes() for file in self.stack.adapters(self.folder / name)]

    def finish(self, name: str) -> str:
        """Goes on until the run ends: identical, different, or "could not resume" with the last words."""
        ended = self.attempt(name)
        if ended.code != 0 or not all(file.is_file() for file in self.stack.adapters(self.folder / name)):
            return f"could not resume: {said(ended.said, self.folder)}"
        return "identical" if self.result(name) == self.wanted else "different"

    def last_words(self) -> str:
        """The last line that the last child printed."""
        lines = (self.folder / "log.txt").read_text(errors="replace").split("\n")
        return said(next((line for line in reversed(lines) if line.strip()), ""), self.folder)

    def copy(self, name: str) -> Path:
        """The run that died after step 12, under another name."""
        self.remove(name)
        return Path(shutil.copytree(self.folder / "half", self.folder / name))

    def remove(self, name: str) -> None:
        """Removes a run."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


def said(text: str, folder: Path) -> str:
    """An error without the paths of this machine, short."""
    return " ".join(text.replace(f"{folder}/", "").replace(str(folder), "").split())[:120]


def counted(outcomes: list[str]) -> dict[str, int]:
    """How often each."""
    return dict(Counter(outcomes).most_common())


# -- the accidents -----------------------------------------------------------------------------------------------------


def kills(ground: Ground, runs: int) -> dict[str, Any]:
    """B1: `kill -9` at two random times of each run, then on to the end.

    A run that ended before its second kill is begun anew. What could not resume is tried once more after its newest
    checkpoint was deleted, as a person at the keyboard might.
    """
    random_, outcomes, repaired, done = random.Random(1), [], [], 0
    while len(outcomes) < runs:
        ground.remove("killed")
        codes = [_killed(ground, random_)]
        if codes[0] == -9:
            codes.append(_killed(ground, random_))
        if 0 in codes:
            continue
        done += codes.count(-9)
        failed = codes[-1] != -9
        outcomes.append(f"could not resume: {ground.last_words()}" if failed else ground.finish("killed"))
        if outcomes[-1].startswith("could not resume"):
            newest = ground.stack.newest(ground.folder / "killed")
            shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
            repaired.append(ground.finish("killed"))
    found = {"runs": runs, "kills": done, "outcomes": counted(outcomes)}
    return found | ({"after_deleting_the_newest_checkpoint_by_hand": counted(repaired)} if repaired else {})


def _killed(ground: Ground, random_: random.Random) -> int | None:
    return ground.attempt("killed", kill_after=random_.uniform(0, 0.95 * ground.seconds)).code


def cuts(ground: Ground) -> dict[str, Any]:
    """B2: stopped at each point of writing a checkpoint, with an older whole one beside it, and with none."""
    cut = _cut_files if isinstance(ground.stack, Incumbent) else _cut_operations
    return {"beside_an_older_one": cut(ground, HALF), "alone": cut(ground, SAVE_STEPS)}


def _cut_files(ground: Ground, step: int) -> dict[str, Any]:
    """The incumbent writes a folder file by file: before each file stands what was written before it."""
    order = [path.name for path in written_order(ground.stack.newest(ground.folder / "half"))]
    outcomes = []
    for kept in range(len(order)):
        run = ground.copy("cut")
        if step == SAVE_STEPS:
            shutil.rmtree(run / f"checkpoint-{HALF}")
        for name in order[kept:]:
            (run / f"checkpoint-{step}" / name).unlink()
        outcomes.append(ground.finish("cut"))
    return {"points": len(order), "order": order, "outcomes": counted(outcomes)}


def written_order(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint in the order in which they were written."""
    return sorted(checkpoint.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.stat().st_ino))


def _cut_operations(ground: Ground, step: int) -> dict[str, Any]:
    """deltaw writes one file: death at each operation of that save on files."""
    outcomes = []
    for number in range(1, 99):
        ground.remove("cut")
        ended = in_child(lambda number=number: _die_in_save(ground, step, number), ground.folder)
        if ended.code == 77:
            break
        assert ended.code == -9, ended
        outcomes.append(ground.finish("cut"))
    return {"points": len(outcomes), "outcomes": counted(outcomes)}


def _die_in_save(ground: Ground, step: int, number: int) -> None:
    save = engine.save_checkpoint

    def saving(folder: Path, at: int, *rest: Any) -> Path:
        if at == step:
            at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL))()
        path = save(folder, at, *rest)
        if at == step:
            os._exit(77)  # the save has fewer operations than that
        return path

    engine.save_checkpoint = saving
    ground.stack.train(ground.folder / "cut")


def flips(ground: Ground, times: int = 5) -> dict[str, Any]:
    """B3: one bit flipped in the data of one file of the newest checkpoint; an older one is there."""
    newest = ground.stack.newest(ground.folder / "half")
    files = sorted(newest.iterdir()) if newest.is_dir() else [newest]
    times = times if len(files) > 1 else 3 * times
    random_, found = random.Random(3), {}
    for file in files:
        outcomes = []
        for _ in range(times):
            damaged = ground.copy("flipped") / file.relative_to(ground.folder / "half")
            content = bytearray(damaged.read_bytes())
            content[random_.randrange(len(content) // 4, len(content))] ^= 1 << random_.randrange(8)
            damaged.write_bytes(content)
            outcomes.append(_flip_outcome(ground))
        found["the checkpoint" if file == newest else file.name] = counted(outcomes)
    return {"flips_per_file": times, "files": found}


def _flip_outcome(ground: Ground) -> str:
    outcome = ground.finish("flipped")
    if outcome.startswith("could not resume"):
        return "detected: stopped"
    if "Skipped a checkpoint" in (ground.folder / "log.txt").read_text():
        return f"detected: older one used, {outcome}"
    return "no effect" if outcome == "identical" else "silently different"


def disk_full(ground: Ground) -> dict[str, Any]:
    """B4: the disk is full in the middle of the third checkpoint (two kept); then there is space again."""
    half, newest = ground.folder / "half", ground.stack.newest(ground.folder / "half")
    mount, run = ground.folder / "disk", ground.folder / "disk" / "run"
    mount.mkdir()
    size = _bytes_on_disk(half) + _bytes_on_disk(newest) // 2
    mounted = _mount(mount, f"size={size}")
    try:
        if mounted:
            full = ground.attempt("disk/run", keep=2)
            still = ground.attempt("disk/run", keep=2).code
            _mount(mount, "remount,size=64m")
        else:
            full, still = ground.attempt("disk/run", keep=2, at=HALF + 2, act=_limit_files), None
        left = sorted(path.name for path in ground.stack.newest(run).parent.iterdir())
        after = ground.finish("disk/run")
    finally:
        if mounted:
            subprocess.run(["umount", str(mount)], check=True)
    how = f"tmpfs of {size // 1024} KB" if mounted else "RLIMIT_FSIZE of 8 KB"
    found = {"how": how, "exit_code": full.code, "says": said(full.said, ground.folder)}
    return found | {"exit_code_of_resume_while_full": still, "left": left, "with_space_again": after}


def _mount(folder: Path, options: str) -> bool:
    """Whether a tmpfs could be mounted there, which needs root."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _bytes_on_disk(folder: Path) -> int:
    files = [folder] if folder.is_file() else list(folder.rglob("*"))
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files if path.is_file())


def _limit_files(_: Tensor) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def nan(ground: Ground) -> dict[str, Any]:
    """B5: one number of one lora_B becomes NaN after step 20 of 60."""
    at = 20
    ended = ground.attempt("nan", at=at, act=_spoil)
    run = ground.folder / "nan"
    if isinstance(ground.stack, Incumbent):
        logged = (ended.value or {}).get("logged", [])
        last = (ended.value or {}).get("steps", at)
    else:
        logged = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        last = logged[-1]["step"]
    after = [str(line["loss"]) for line in logged if line["step"] > at]
    files = [path for path in run.rglob("adapter_model.safetensors") if path.is_file()]
    bad = [path for path in files if not _all_finite(path)]
    return {
        "exit_code": ended.code,
        "says": said(ended.said, ground.folder),
        "steps_that_followed": last - at,
        "losses_logged_after": counted(after),
        "adapters_saved": len(files),
        "adapters_saved_with_nan": len(bad),
        "final_adapter_is_nan": any(path in bad for path in ground.stack.adapters(run)),
    }


def _spoil(lora_b: Tensor) -> None:
    lora_b.view(-1)[0] = float("nan")


def _all_finite(path: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in safetensors.torch.load_file(path).values())
