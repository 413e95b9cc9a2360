"""Files and folders that are complete or absent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from deltaw import disk
from deltaw.disk import disk_errors, new_folder, sha256_file, write_bytes, write_text
from deltaw.errors import DiskError


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_file_holds_all_chunks_and_nothing_is_left_beside_it(tmp_path):
    write_bytes(tmp_path / "a", b"one", memoryview(b"two"))
    write_text(tmp_path / "b", "größe")
    assert tree(tmp_path) == {"a": b"onetwo", "b": "größe".encode()}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(DiskError, match=r"Could not write .*a: No space left on device\. Free some space"):
        write_text(tmp_path / "a", "new")
    assert tree(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_sync_folders_will_do_but_not_one_that_fails(tmp_path, monkeypatch, number):
    sync = disk.os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(disk.os, "fsync", refuse_folders)
    with contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(DiskError):
        write_text(tmp_path / "a", "new")
        with new_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
    assert (tmp_path / "folder" / "inner").is_dir() == (number == errno.EINVAL)


def test_a_chunk_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "a", b"half", 3)  # type: ignore[arg-type]
    assert tree(tmp_path) == {"a": b"old"}


def test_a_new_folder_appears_complete(tmp_path):
    target = tmp_path / "deep" / "run"
    with new_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("x")
        assert not target.exists() and temporary.parent == target.parent
    assert tree(tmp_path) == {"deep/run/inner/a": b"x"}
    assert [path.name for path in target.parent.iterdir()] == ["run"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    for number in (1, 2):
        with new_folder(tmp_path / "run") as temporary:
            (temporary / f"a{number}").write_text("x")
    assert tree(tmp_path) == {"run/a2": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_inside_leaves_the_old_content_and_no_half_folder(error, tmp_path):
    with new_folder(tmp_path / "run") as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(DiskError if error is OSError else error), new_folder(tmp_path / "run") as temporary:
        (temporary / "b").write_text("half")
        raise error("stop")
    assert tree(tmp_path) == {"run/a": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_inside_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "run"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    with new_folder(tmp_path / "run") as temporary:
        (temporary / "a").write_text("old")
    rename = Path.rename

    def fails_on_the_new_one(path: Path, target: Path):
        if path.name.startswith(".run") and not path.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_on_the_new_one)
    with pytest.raises(DiskError, match="Input/output error"), new_folder(tmp_path / "run") as temporary:
        (temporary / "b").write_text("new")
    assert tree(tmp_path) == {"run/a": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_path_that_cannot_be_written_is_a_disk_error_with_its_name(tmp_path):
    (tmp_path / "file").write_text("x")
    under = tmp_path / "file" / "below"
    with pytest.raises(DiskError, match=r"Could not write .*below"):
        write_bytes(under, b"x")
    with pytest.raises(DiskError, match=r"Could not write .*below"), new_folder(under):
        pass
    assert tree(tmp_path) == {"file": b"x"}


def test_errors_of_the_system_keep_their_reason_and_others_pass(tmp_path):
    with (
        pytest.raises(DiskError, match=r"Could not read .*nothing: No such file") as raised,
        disk_errors("read", tmp_path / "nothing"),
    ):
        (tmp_path / "nothing").read_bytes()
    assert isinstance(raised.value.__cause__, FileNotFoundError) and raised.value.exit_code == 5
    with pytest.raises(KeyError), disk_errors("read", tmp_path):
        raise KeyError


def test_sha256_is_that_of_hashlib(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
