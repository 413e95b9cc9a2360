"""What a signal raises while weights are read comes out as itself, at whatever moment it comes."""

from __future__ import annotations

import json
import os
import select
import signal
import threading
import time
from collections import Counter

import pytest
import safetensors.torch
import torch

from deltaw.adapter import read_adapter
from deltaw.base.load import open_model
from deltaw.errors import signals_kept


def _in_a_child(read, times):
    """How `read` ended, `times` times, each stopped at another moment of the time that it takes, and some behind it.

    In a child: where transformers is stopped while it opens a model, it leaves gradients turned off.
    """
    read()  # the first time may take longer
    since = time.perf_counter()
    read()
    longest = 1.5 * (time.perf_counter() - since)
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
        if not select.select([answer], [], [], 300)[0]:
            os.kill(child, signal.SIGKILL)
        told = answer.read()
    os.waitpid(child, 0)
    return Counter(json.loads(told or "{}"))


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

    plain = _in_a_child(lambda: safetensors.torch.load_file(many), 300)
    assert plain["ValueError"] > 10  # else there is nothing to keep any more
    endings = _in_a_child(kept, 300)
    assert set(endings) <= {"read", "KeyboardInterrupt"} and endings["KeyboardInterrupt"] > 30


@pytest.mark.parametrize(("what", "times"), [("adapter", 300), ("base", 100)])
def test_ctrl_c_while_files_are_read_is_no_fault_of_theirs(what, times, tiny_run, llama_folder):
    reads = {
        "adapter": lambda: read_adapter(tiny_run.adapter),
        "base": lambda: open_model(llama_folder, torch.float32),
    }
    endings = _in_a_child(reads[what], times)
    assert set(endings) <= {"read", "KeyboardInterrupt"} and endings["KeyboardInterrupt"] > times / 10


@pytest.fixture
def handlers():
    """Sets handlers for a test, and puts back what was there."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield lambda ours: [signal.signal(number, ours) for number, _ in before]
    for number, handler in before:
        signal.signal(number, handler)


def test_handlers_are_as_before_afterwards_but_for_what_they_did_themselves(handlers):
    def stop(_number, _frame):
        raise KeyboardInterrupt

    handlers(stop)
    with signals_kept(), signals_kept():
        assert signal.getsignal(signal.SIGINT) is not stop
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is stop
    with pytest.raises(KeyboardInterrupt), signals_kept(), signals_kept():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("as torch does it") from None
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is stop
    with pytest.raises(ValueError, match="another"), signals_kept():
        raise ValueError("another")

    def let_the_next_end_it(number, _frame):
        signal.signal(number, signal.SIG_DFL)

    handlers(let_the_next_end_it)
    with signals_kept():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL and signal.getsignal(signal.SIGTERM) is let_the_next_end_it


def test_what_the_system_does_by_itself_stays_and_other_threads_have_no_handlers(handlers):
    seen = []

    def look():
        with signals_kept():
            seen.append(signal.getsignal(signal.SIGINT))

    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        handlers(handler)
        look()
    handlers(signal.default_int_handler)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler]


def test_an_error_that_a_handler_raises_is_not_its_own_cause(handlers):
    def late(_number, _frame):
        raise TimeoutError("late")

    handlers(late)
    with pytest.raises(TimeoutError) as raised, signals_kept():
        signal.raise_signal(signal.SIGINT)
    assert raised.value.__cause__ is None
