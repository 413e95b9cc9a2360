"""Kills, failing disks, flipped bits, signals and NaNs: no run is lost, and none ends other than it would have.

The short form of `make torture`, which takes the same attempts further (benchmarks/torture.py). Two kinds at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

COUNTS = {"kills": 300, "flips": 5000, "faults": 400, "cuts": 400, "ways": 24, "signals": 25, "nans": 60}
SCRIPT = Path(__file__).parent / "torture.py"


def _torture(kind: str) -> dict:
    command = [sys.executable, str(SCRIPT), kind, str(COUNTS[kind])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def started():
    with ThreadPoolExecutor(2) as pool:
        yield {kind: pool.submit(_torture, kind) for kind in COUNTS}


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
    known = {"0", "130", "143", "-15"}  # the last: before training began
    assert set(found["exit_codes"]) <= known, found["last_error"]


def test_nan_and_infinity_stop_a_run_within_a_step_name_rows_and_reach_no_file(started):
    found = _of(started, "nans")
    assert found["stopped"] == found["clean"] == found["named"] == found["nans"]
