"""What a signal raises while weights are read comes out as itself, at whatever moment it comes."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest
import safetensors.torch
import torch

from deltaw.adapter import read_adapter
from deltaw.base.load import open_model
from deltaw.errors import signals_kept


def _in_a_child(read, times, longest):
    """How `read` ended, `times` times, each stopped at another moment of `longest` seconds.

    In a child: where transformers is stopped while it opens a model, it leaves gradients turned off.
    """
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Python tells of stops amid what it clears up
            os.write(sending, json.dumps(_stopped(read, times, longest)).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as answer:
        endings = Counter(json.load(answer))
    os.waitpid(child, 0)
    return endings


def _stopped(read, times, longest):
    waiting = False

    def stop(_number, _frame):
        nonlocal waiting
        if waiting:  # and not while the endings are counted
            waiting = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    endings = Counter()
    for number in range(times):
        waiting = True
        try:
            signal.setitimer(signal.ITIMER_REAL, longest * (number + 1) / times)
            read()
            waiting, ending = False, "read"
        except BaseException as error:
            waiting, ending = False, type(error).__name__
        endings[ending] += 1
    return endings


def test_torch_drops_what_a_handler_raises_unless_it_is_kept(tmp_path):
    many = tmp_path / "many.safetensors"
    safetensors.torch.save_file({f"t{number}": torch.ones(8, 8) for number in range(200)}, many)

    def kept():
        with signals_kept():
            safetensors.torch.load_file(many)

    plain = _in_a_child(lambda: safetensors.torch.load_file(many), 300, 0.002)
    assert plain["ValueError"] > 10  # else there is nothing to keep any more
    endings = _in_a_child(kept, 300, 0.002)
    assert set(endings) <= {"read", "KeyboardInterrupt"} and endings["KeyboardInterrupt"] > 30


@pytest.mark.parametrize(("what", "times"), [("adapter", 300), ("base", 200)])
def test_ctrl_c_while_files_are_read_is_no_fault_of_theirs(what, times, tiny_run, llama_folder):
    read, longest = {
        "adapter": (lambda: read_adapter(tiny_run.adapter), 0.002),
        "base": (lambda: open_model(llama_folder, torch.float32), 0.03),
    }[what]
    endings = _in_a_child(read, times, longest)
    assert set(endings) <= {"read", "KeyboardInterrupt"} and endings["KeyboardInterrupt"] > times / 10
