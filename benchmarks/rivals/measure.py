"""Launches a tool's runner in a fresh process, watches its memory, and keeps one JSON row for every finished run.

A row is found again by its key, the code that it measured and the machine: rows of others stay in the file and count
for nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rivals import environments
from rivals.job import Job
from rivals.settings import WORKLOADS, Setting

from deltaw import hardware

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNNERS = {
    "deltaw": "deltaw_run.py",
    "trl": "hf_run.py",
    "unsloth": "hf_run.py",
    "reference": "reference_run.py",
    "gemm": "gemm_run.py",
}
HOT = ("adapter", "base", "data", "engine", "kernels", "hardware.py")
SAMPLE_SECONDS = 2.0
Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The minutes of this benchmark are over; what was measured is stored."""


@dataclass
class Bench:
    """Where everything lies, and the rows so far. `cores` is the number of threads that every tool gets."""

    envs: Path
    file: Path
    base: str
    cores: int
    deadline: float = float("inf")
    rows: dict[str, Row] = field(default_factory=dict)
    code: str = ""
    cpu: str = ""

    def open(self) -> None:
        """Reads the stored rows of this code and this machine."""
        self.code, self.cpu = code_digest(), hardware.look().cpu_name
        stored = [json.loads(line) for line in self.file.read_text("utf-8").splitlines()] if self.file.is_file() else []
        ours = [row for row in stored if (row["code"], row["cpu"], row["cores"]) == (self.code, self.cpu, self.cores)]
        self.rows = {row["key"]: row for row in ours}
        if other := len(stored) - len(ours):
            tell(f"{other} stored rows are of other code or another machine and left aside (--fresh drops them)")

    def job(self, tool: str, workload: str, setting: Setting, **given: Any) -> Job:
        """A job over the training rows of a workload; `given` replaces what is usual."""
        data = self.envs / "data"
        shape = json.loads((data / "workloads.json").read_text("utf-8"))["workloads"][workload]
        job = Job(
            tool=tool,
            workload=workload,
            data=str(data / workload / "train"),
            base=self.base,
            start=str(data / "start"),
            setting=setting,
            examples_per_step=shape["examples_per_step"],
        )
        return replace(job, **given)

    def once(self, key: str, job: Job, *, fresh_compiler: bool = False) -> Row:
        """The row of this key at this setting, measured now if it is not there.

        Raises OutOfTimeError rather than begin a run late.
        """
        if not self._has(key, job):
            if time.time() > self.deadline:
                raise OutOfTimeError
            tell(key)
            self.keep(key, launch(self, job, fresh_compiler))
        return self.rows[key]

    def _has(self, key: str, job: Job) -> bool:
        """Whether a row was measured under this key in the same way."""
        row = self.rows.get(key)
        if row is None or row.get("setting", job.setting) != job.setting:
            return False
        return row.get("seconds_asked", job.seconds) == job.seconds and row.get("steps_asked", job.steps) == job.steps

    def keep(self, key: str, row: Row) -> None:
        """Stores a row under a key."""
        self.rows[key] = {"key": key, "code": self.code, "cpu": self.cpu, "cores": self.cores, **row}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[key]) + "\n")

    def folder(self, *names: str) -> Path:
        """A folder below the environments, made if it is not there."""
        path = self.envs.joinpath(*names)
        path.mkdir(parents=True, exist_ok=True)
        return path


def code_digest() -> str:
    """sha256 over deltaw's hot path, the runners, the workloads and the pinned versions."""
    parts = [ROOT / "deltaw" / part for part in HOT]
    files = [path for part in parts for path in ([part] if part.is_file() else sorted(part.rglob("*")))]
    files = [path for path in files if path.suffix in (".py", ".cpp", ".hpp")]
    files += [HERE / "job.py", HERE / "workloads.py", *sorted(HERE.glob("*_run.py")), *sorted(HERE.glob("*.txt"))]
    content = [*(path.read_bytes() for path in files), repr(WORKLOADS).encode()]
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


def launch(bench: Bench, job: Job, fresh_compiler: bool = False) -> Row:
    """Runs one job to its end; a run that fails gives a row with `error` instead of numbers."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, out, err = (Path(scratch) / name for name in ("job.json", "out", "err"))
        started = time.time()
        asked.write_text(json.dumps(asdict(replace(job, started=started))), "utf-8")
        compiler = scratch if fresh_compiler else str(bench.folder("inductor"))
        command = [environments.python_of(job.tool, bench.envs), str(HERE / RUNNERS[job.tool]), str(asked)]
        before = _steal()
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=bench.folder("work"),
                env=environment(job.tool, bench.cores, compiler),
            )  # fmt: skip
            peak = _watch(process)
        row = _answer(out) if process.returncode == 0 else {"error": _last_error(err)}
        row |= {"tool": job.tool, "workload": job.workload, "setting": job.setting, "task": job.task}
        row |= {"seconds_asked": job.seconds, "steps_asked": job.steps}
        steal = _steal()
        share = (steal[0] - before[0]) / max(1, steal[1] - before[1])
        return {**row, "pss_peak_bytes": peak, "wall_seconds": round(time.time() - started, 2), "steal_share": share}


def environment(tool: str, cores: int, compiler_cache: str) -> dict[str, str]:
    """What a tool's process gets: for all the same threads and no network; deltaw is found by its own runners only."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if tool in ("deltaw", "gemm"):
        kept["PYTHONPATH"] = str(ROOT)
    return {
        **kept,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": compiler_cache,
    }


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end; the most memory that the process and its children held together, shared pages once."""
    peak, looked = 0, 0.0
    while process.poll() is None:
        if time.monotonic() - looked > SAMPLE_SECONDS:
            peak, looked = max(peak, sum(_pss(pid) for pid in _tree(process.pid))), time.monotonic()
        time.sleep(0.1)
    return peak


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    try:
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in listed.read_text("utf-8").split():
                found += _tree(int(child))
    except OSError:  # it has just ended
        pass
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _steal() -> tuple[int, int]:
    """(ticks that the host took away, all ticks) since the machine started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:]]
    return ticks[7], sum(ticks[:8])


def _answer(out: Path) -> Row:
    lines = [line for line in out.read_text("utf-8", errors="replace").splitlines() if line.startswith("{")]
    answer: Row = json.loads(lines[-1])
    return answer


def _last_error(err: Path) -> str:
    """The last line of what a runner complained, without the paths of this machine."""
    lines = [line for line in err.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return re.sub(r"/[\w./-]+/", "…/", lines[-1] if lines else "no message")[:300]


def tell(line: str) -> None:
    """One line of progress."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)
