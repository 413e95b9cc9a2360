"""A virtual environment for each rival, made with this Python's own venv and pip from the pinned list beside this file.

torch comes first and with its dependencies, as the machine's pip is set up to get it; everything else is installed as
listed and not resolved, because unsloth's metadata asks for GPU packages that its CPU path never imports.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
RIVALS = ("trl", "unsloth")


def python_of(tool: str, envs: Path) -> str:
    """The interpreter that runs a tool: its own environment's, TRL's for the reference, else this one."""
    where = "trl" if tool == "reference" else tool
    return str(envs / where / "bin" / "python") if where in RIVALS else sys.executable


def make(envs: Path, tools: tuple[str, ...] = RIVALS) -> None:
    """Makes what is not there yet, or was made from another list; some minutes for each."""
    for tool in tools:
        wanted = HERE / f"requirements-{tool}.txt"
        mark = envs / tool / "requirements.sha256"
        digest = hashlib.sha256(wanted.read_bytes()).hexdigest()
        if mark.is_file() and mark.read_text("utf-8") == digest:
            continue
        print(f"making {envs / tool}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(envs / tool)], check=True)
        install = [python_of(tool, envs), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, "--no-deps", "-r", str(wanted)], check=True)
        mark.write_text(digest, "utf-8")
