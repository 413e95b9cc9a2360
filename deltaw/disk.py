"""Files that are either complete or absent: temporary name, fsync, rename, fsync of the directory. And digests.

Every file that deltaw promises to keep goes through here, so that a crash, a full disk or a second process can leave
an old version or the new one, never half of one. Errors of the system become DiskError with the path and the reason.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from deltaw.errors import DiskError, UsageError


@contextlib.contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside into a DiskError that names the action, the path, the reason and the next step."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(
            f"Could not {action} {path}: {reason}. Free some space or check the permissions, then run it again."
        ) from error


# What file systems answer that know no fsync of a directory: old CIFS, some of containers and clusters.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}


def fsync_path(path: Path) -> None:
    """Asks the system to put a file on the disk now, or a directory where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, *chunks: bytes | memoryview) -> None:
    """Writes a whole file under a temporary name and renames it; raises DiskError and leaves the old one otherwise."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error. Raises DiskError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors("write", path):
        try:
            yield temporary
            fsync_path(temporary)
            temporary.replace(path)
            fsync_path(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def require_new(out: Path) -> None:
    """Raises UsageError when the folder exists: nothing is ever overwritten."""
    if out.exists():
        raise UsageError(f"{out} exists already and is never overwritten. Move it away, or choose another --out.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error.

    A folder that stood there before is moved aside first and removed last. Raises DiskError.
    """
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                fsync_path(file)
            _take_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    aside = temporary.with_name(temporary.name + ".old")
    if path.exists():
        path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    fsync_path(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Only one process at a time is inside; the system frees the lock if that process dies."""
    with disk_errors("lock", path):
        file = path.open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_once(path: Path, is_there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Has one process make what is not there yet; others wait meanwhile, and find it made. Raises DiskError."""
    if is_there():
        return
    with disk_errors("make", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with only_one(path.with_name(f".{path.name}.lock")):
        if not is_there():  # another process may have made it while this one waited
            make()


def keep_note(path: Path, text: str) -> None:
    """Writes a small file into a cache; where that cannot be written, finding out anew only costs time."""
    with contextlib.suppress(OSError, DiskError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal. Raises DiskError."""
    with disk_errors("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_KNOWN: dict[tuple[str, int, int], str] = {}


def remembered_digest(path: Path, memory: Path | None = None) -> str:
    """The sha256 of a file, computed once for a path, size and time of change; `memory` is a folder to keep it in."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _KNOWN:
        kept = None if memory is None else memory / hashlib.sha256(repr(key).encode()).hexdigest()
        if kept is not None:
            with contextlib.suppress(OSError):
                _KNOWN[key] = kept.read_text("utf-8")
        if key not in _KNOWN:
            _KNOWN[key] = sha256_file(path)
            if kept is not None:
                keep_note(kept, _KNOWN[key])
    return _KNOWN[key]
