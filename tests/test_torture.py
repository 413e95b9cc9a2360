"""Kills, failing disks, flipped bits, signals and NaNs: no run is lost, and none ends other than it would have.

The short form of `make torture`, which takes the same attempts further (benchmarks/torture.py). The attempts begin when
the tests do, in processes of their own and of low priority (tests/conftest.py), since they take minutes and one core.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

COUNTS = {"kills": 300, "flips": 5000, "faults": 400, "cuts": 400, "ways": 24, "signals": 25, "nans": 60}
SCRIPT = Path(__file__).parent / "torture.py"
ATTEMPTS = pytest.StashKey["Attempts"]()


class Attempts:
    """All kinds, so many of them at a time."""

    def __init__(self, at_once: int) -> None:
        self._pool, self._running, self._ended = ThreadPoolExecutor(at_once), set[subprocess.Popen](), threading.Event()
        self.found: dict[str, Future] = {kind: self._pool.submit(self._torture, kind) for kind in COUNTS}

    def _torture(self, kind: str) -> dict:
        assert not self._ended.is_set(), "the tests ended before"
        command = ["nice", "-n", "15", sys.executable, str(SCRIPT), kind, str(COUNTS[kind])]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._running.add(process)
        out, error = process.communicate(timeout=1200)
        self._running.discard(process)
        assert process.returncode == 0, error[-3000:]
        return json.loads(out.splitlines()[-1])

    def end(self) -> None:
        """Stops what still runs."""
        self._ended.set()
        for process in list(self._running):
            os.killpg(process.pid, signal.SIGKILL)
        self._pool.shutdown()


@pytest.fixture
def started(request):
    return request.config.stash[ATTEMPTS].found


def _of(started: dict[str, Future], kind: str) -> dict:
    return started[kind].result()


def test_three_hundred_kills_lose_no_run_and_change_no_bit(started):
    found = _of(started, "kills")
    assert found["kills"] >= 300 and found["others"] == [] and found["identical"] == found["runs"] > 100


def test_kills_change_no_bit_either_where_a_base_is_streamed_or_quantised_or_computes_blocks_again(started):
    found = _of(started, "ways")
    assert found["kills"] >= 24 and found["others"] == [] and found["identical"] == found["runs"]
    assert found["ways"] == 4 and found["as_plain"] == 2


def test_five_thousand_flipped_bits_and_truncations_are_all_found_and_the_older_checkpoint_is_used(started):
    found = _of(started, "flips")
    assert found["found"] == found["fell_back"] == found["flips"] == 5000


def test_a_disk_that_fails_at_any_operation_ends_with_exit_code_5_and_the_run_goes_on_afterwards(started):
    found = _of(started, "faults")
    assert found["identical"] == found["faults"] > 60 and found["others"] == []
    assert set(found["exit_codes"]) <= {"0", "5"} and found["exit_codes"]["5"] > 50


def test_death_at_any_operation_on_files_loses_nothing(started):
    found = _of(started, "cuts")
    assert found["identical"] == found["cuts"] > 60 and found["others"] == []


def test_a_signal_at_any_time_ends_a_run_soon_and_it_goes_on_exactly(started):
    found = _of(started, "signals")
    assert found["identical"] == found["signals"] and found["longest_seconds"] < 5
    assert sum(count for code, count in found["exit_codes"].items() if code != "0") >= 5  # the others came too late
    known = {"0", "130", "143", "-15"}  # the last: before training began
    assert set(found["exit_codes"]) <= known, found["last_error"]


def test_nan_and_infinity_stop_a_run_within_a_step_name_rows_and_reach_no_file(started):
    found = _of(started, "nans")
    assert found["stopped"] == found["clean"] == found["named"] == found["nans"]
