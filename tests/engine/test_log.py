"""metrics.jsonl: whole lines only, nothing twice after an interruption, and a full disk is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw.engine.log import MetricsLog, open_trackers, read_metrics
from deltaw.errors import DiskError, UsageError


def test_lines_are_on_disk_as_soon_as_they_are_written_and_reach_the_trackers(tmp_path):
    heard = []
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers=[heard.append])
    for line in ({"step": 1, "loss": 0.1}, {"step": 1, "eval_loss": 0.2}):
        log.write(line)
        assert read_metrics(log.path)[-1] == line == heard[-1]
    log.close()


@pytest.mark.parametrize("last_step", [0, 2, 9])
def test_opened_again_it_drops_what_lies_behind_the_checkpoint(tmp_path, last_step):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1}, {"step": 2}, {"step": 2, "eval_loss": 1.0}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    log = MetricsLog(path, last_step)
    log.write({"step": last_step + 1})
    log.close()
    assert read_metrics(path) == [line for line in lines if line["step"] <= last_step] + [{"step": last_step + 1}]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "absent") == []


def test_a_damaged_line_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff\x00\n[3]\n{"step": 4}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 4}]
    path.unlink()
    path.mkdir()
    with pytest.raises(DiskError):
        MetricsLog(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_a_disk_error_and_closing_raises_no_other(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with Path("/dev/full").open("ab", buffering=0) as full:
        log._file.close()
        log._file = full
        with pytest.raises(DiskError, match="No space left on device"):
            log.write({"step": 1})
        log.close()


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no_such_tracker.*pip install no_such_tracker"):
        open_trackers(["no_such_tracker"], tmp_path)


def test_tensorboard_holds_every_number_of_every_step(tmp_path):
    """Written through the tracker, read back by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (track,) = open_trackers(["tensorboard"], tmp_path)
    for step in (1, 2):
        track({"step": step, "loss": 1.5 / step, "tokens": 10 * step})
    track({"step": 2, "eval_loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        "loss": [(1, 1.5), (2, 0.75)], "tokens": [(1, 10.0), (2, 20.0)], "eval_loss": [(2, 0.25)],
    }  # fmt: skip
