"""The checkpoint file: what goes in comes out, and nothing damaged is ever taken for good."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from deltaw.engine.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint, save_checkpoint
from deltaw.errors import DiskError

STATE = {"step": 7, "best_loss": None, "seconds": 0.1 + 0.2, "digests": {"base": "ab"}, "name": "Ünïcode"}


def _tensors():
    return {"master": torch.randn(50), "step": torch.tensor([3.0, 4.0]), "half": torch.randn(3).bfloat16()}


def test_tensors_and_state_come_back_bit_for_bit(tmp_path):
    tensors = _tensors()
    path = save_checkpoint(tmp_path / "deep" / "checkpoints", 7, tensors, STATE, keep=2)
    read, state = read_checkpoint(path)
    assert state == STATE and read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_every_truncation_is_detected(tmp_path):
    content = save_checkpoint(tmp_path, 1, {"master": torch.randn(8)}, {"step": 1}, keep=1).read_bytes()
    path = tmp_path / "cut.ckpt"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)


def test_every_flipped_bit_is_detected(tmp_path):
    content = save_checkpoint(tmp_path, 1, {"master": torch.randn(8)}, {"step": 1}, keep=1).read_bytes()
    path, choose = tmp_path / "flipped.ckpt", random.Random(0)
    for bit in choose.sample(range(8 * len(content)), 200):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(path)


def test_the_newest_good_one_is_taken_and_the_skipped_are_named(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"master": torch.full((2,), float(step))}, {"step": step}, keep=9)
    for name, keep in (("step-00000004.ckpt", 0), ("step-00000003.ckpt", -1)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:keep])
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None and found[1] == {"step": 2} and found[0]["master"].tolist() == [2.0, 2.0]
    assert [reason.split()[0] for reason in skipped] == ["step-00000004.ckpt", "step-00000003.ckpt"]


def test_a_folder_without_a_good_checkpoint_gives_none(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])
    (tmp_path / "step-00000001.ckpt").write_bytes(b"")
    found, skipped = newest_checkpoint(tmp_path)
    assert found is None and len(skipped) == 1


def test_only_the_newest_are_kept_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "step-notes.ckpt").write_text("mine")
    for step in (5, 30, 100, 1000):
        save_checkpoint(tmp_path, step, {"master": torch.zeros(1)}, {"step": step}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00001000.ckpt", "step-00000100.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000100.ckpt", "step-00001000.ckpt", "step-notes.ckpt",
    ]  # fmt: skip


@pytest.mark.parametrize("keep", [1, 2])
def test_a_good_checkpoint_is_kept_and_damaged_ones_of_later_steps_go(tmp_path, keep):
    for step in (100, 200):
        (tmp_path / f"step-{step:08}.ckpt").write_bytes(b"")
    save_checkpoint(tmp_path, 10, {"master": torch.zeros(1)}, {"step": 10}, keep=keep)
    (found, skipped) = newest_checkpoint(tmp_path)
    assert found[1] == {"step": 10} and not skipped
    save_checkpoint(tmp_path, 20, {"master": torch.zeros(1)}, {"step": 20}, keep=keep)
    assert len(list_checkpoints(tmp_path)) == keep


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, {"master": torch.zeros(1)}, {}, keep=1)


def test_one_that_cannot_be_read_is_no_damaged_one_and_ends_the_search(tmp_path, monkeypatch):
    """It may be good: going on from an older one would remove it."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"master": torch.zeros(1)}, {"step": step}, keep=9)
    usual = Path.open

    def failing(path, *given, **more):
        if path.name == "step-00000002.ckpt":
            raise OSError(errno.EIO, "Input/output error")
        return usual(path, *given, **more)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(DiskError, match="step-00000002"):
        newest_checkpoint(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"master": torch.zeros(1)}, {"step": 1}, keep=1)
    assert list_checkpoints(tmp_path / "absent") == []

    def failing(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("scandir", "listdir"):  # of which one or the other lists a folder in every Python
        monkeypatch.setattr(os, name, failing)
    with pytest.raises(DiskError, match="Permission denied"):
        newest_checkpoint(tmp_path)


def test_what_was_read_stays_when_the_file_is_gone(tmp_path):
    tensors = {"none": torch.zeros(0, 3), "one": torch.tensor(2.5), "many": torch.randn(64, 3)}
    path = save_checkpoint(tmp_path, 1, tensors, {"step": 1}, keep=1)
    read, _ = read_checkpoint(path)
    path.unlink()
    assert all(torch.equal(read[name], tensor) and read[name].shape == tensor.shape for name, tensor in tensors.items())
