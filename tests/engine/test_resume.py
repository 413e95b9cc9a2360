"""A run that was stopped, killed or lost a file goes on as if nothing had happened: bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from deltaw import training
from deltaw.config import make_settings
from deltaw.engine.checkpoint import list_checkpoints, read_checkpoint
from deltaw.engine.clock import WrittenClock
from deltaw.engine.log import read_metrics
from deltaw.engine.loop import StepRecord
from deltaw.engine.run import create_run, open_run
from deltaw.engine.train import Watcher, train
from deltaw.errors import DataError, DiskError, Interrupted, NotFiniteError, UsageError

STEPS = 12
TIMES = ("seconds", "peak_bytes", "eval_seconds")


class Killed(BaseException):
    """Stands for a process that ends here: nothing of ours catches it."""


class Saboteur(Watcher):
    """Sends a real signal after one step, or ends everything within one step or evaluation; remembers what was said."""

    def __init__(self, *, signal_at=0, kill_at=0, kill_in_evaluation=0, number=signal.SIGTERM):
        self.signal_at, self.kill_at, self.kill_in_evaluation, self.number = (
            signal_at,
            kill_at,
            kill_in_evaluation,
            number,
        )
        self.said = []

    def say(self, text):
        self.said.append(text)

    def step(self, line, progress, length):
        if line["step"] == self.signal_at:
            os.kill(os.getpid(), self.number)
        if line["step"] == self.kill_at:
            raise Killed

    def evaluation(self, line, best):
        if line["step"] == self.kill_in_evaluation:
            raise Killed


@pytest.fixture(scope="module")
def start(tmp_path_factory, llama_folder, chats):
    """Makes a new run with these settings over the usual ones."""

    def make(name="run", **changes):
        usual = {
            "model": str(llama_folder), "data": [str(chats)], "out": str(tmp_path_factory.mktemp("runs") / name),
            "rank": 4, "targets": ["q_proj", "down_proj"], "dropout": 0.2, "steps": STEPS, "batch_tokens": 256,
            "micro_tokens": 128, "lr": 2e-2, "eval_steps": 2, "checkpoint_steps": 3, "device": "cpu",
            "dtype": "float32",
        }  # fmt: skip
        settings = make_settings({**usual, **changes})
        return create_run(settings), settings

    return make


@pytest.fixture(scope="module")
def straight(start):
    """A run that nothing interrupted."""
    run, settings = start("straight")
    train(run, settings, Watcher())
    return run


def _go_on(run, watcher=None):
    return train(run, run.settings(), watcher or Watcher(), resume=True)


def _lines(run):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run.metrics)]


def _assert_same(run, other):
    for folder in ("adapter", "last"):
        names = sorted(path.name for path in (run.folder / folder).iterdir())
        assert names == sorted(path.name for path in (other.folder / folder).iterdir())
        for name in names:
            assert (run.folder / folder / name).read_bytes() == (other.folder / folder / name).read_bytes(), name
    assert _lines(run) == _lines(other)
    (_, first), (_, second) = (read_checkpoint(list_checkpoints(r.checkpoints)[0]) for r in (run, other))
    free = ("seconds", "config")  # how long it took, and how many checkpoints are kept
    assert {k: v for k, v in first.items() if k not in free} == {k: v for k, v in second.items() if k not in free}


def test_the_uninterrupted_run_has_every_line_once(straight):
    lines = _lines(straight)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == list(range(2, STEPS + 1, 2))


@pytest.mark.parametrize("stops", [[4], [7], [3, 5]], ids=["4", "7", "twice in an epoch"])
def test_a_run_stopped_by_a_signal_goes_on_bit_for_bit(start, straight, stops):
    run, settings = start()
    watcher = Saboteur(signal_at=stops[0])
    with pytest.raises(Interrupted, match=rf"after step {stops[0]}\. Go on with: deltaw train --resume") as stopped:
        train(run, settings, watcher)
    assert stopped.value.exit_code == 143
    for step in stops[1:]:
        with pytest.raises(Interrupted, match=f"after step {step}"):
            _go_on(run, Saboteur(signal_at=step, number=signal.SIGINT))
    _go_on(run)
    _assert_same(run, straight)


@pytest.mark.parametrize(
    ("exact", "ways"),
    [
        (True, {"recompute": 2}),
        (True, {"stream": True}),
        (True, {"stream": True, "recompute": 1}),
        (False, {"quant": "nf4"}),
        (False, {"quant": "int8", "stream": True, "recompute": 1}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_run_goes_on_bit_for_bit_when_its_base_is_streamed_or_quantised_or_computes_blocks_again(
    start, straight, exact, ways
):
    if not exact:
        straight, settings = start("quantised", **ways)
        train(straight, settings, Watcher())
    run, settings = start(**ways)
    with pytest.raises(Interrupted, match="after step 4"):
        train(run, settings, Saboteur(signal_at=4))
    with pytest.raises(Killed):
        _go_on(run, Saboteur(kill_at=8))
    _go_on(run)
    _assert_same(run, straight)


@pytest.mark.parametrize(
    "saboteur",
    [Saboteur(kill_at=5), Saboteur(kill_at=3), Saboteur(kill_in_evaluation=8), Saboteur(kill_in_evaluation=6)],
    ids=["between checkpoints", "before its checkpoint", "better adapter is newer", "evaluated, not saved"],
)
def test_a_killed_run_goes_on_bit_for_bit(start, straight, saboteur):
    run, settings = start()
    with pytest.raises(Killed):
        train(run, settings, saboteur)
    _go_on(run)
    _assert_same(run, straight)


def test_the_best_adapter_is_that_of_the_checkpoint_and_not_a_newer_one_on_disk(start, monkeypatch):
    run, settings = start(steps=8)
    with pytest.raises(Killed):
        train(run, settings, Saboteur(kill_in_evaluation=8))
    _, state = read_checkpoint(list_checkpoints(run.checkpoints)[0])
    assert (state["step"], state["best_step"]) == (6, 6), "the adapter on disk is of step 8"
    newer = (run.adapter / "adapter_model.safetensors").read_bytes()
    # From here on every evaluation is worse, so the best is what the checkpoint knows and nothing else.
    monkeypatch.setattr("deltaw.engine.train.held_out_loss", lambda *_: (1e9, 1, 0.0))
    train(run, run.settings(), Watcher(), resume=True)
    (tensors, final) = read_checkpoint(list_checkpoints(run.checkpoints)[0])
    assert final["best_step"] == 6 and final["best_loss"] == state["best_loss"]
    assert not torch.equal(tensors["best"], tensors["master"])
    assert (run.adapter / "adapter_model.safetensors").read_bytes() != newer


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(start, straight):
    run, settings = start()
    with pytest.raises(Killed):
        train(run, settings, Saboteur(kill_at=8))
    newest = list_checkpoints(run.checkpoints)[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    watcher = Saboteur()
    _go_on(run, watcher)
    assert f"Skipped a checkpoint: {newest.name} is damaged (its checksum is wrong)." in watcher.said
    _assert_same(run, straight)


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0(start, straight):
    run, settings = start()
    with pytest.raises(Killed):
        train(run, settings, Saboteur(kill_at=2))
    assert not list_checkpoints(run.checkpoints) and len(_lines(run)) == 2
    watcher = Saboteur()
    _go_on(run, watcher)
    assert "No checkpoint yet: starting from step 0." in watcher.said
    _assert_same(run, straight)


def test_a_signal_before_the_first_step_ends_leaves_a_run_that_goes_on(start, straight):
    run, settings = start()

    def at_once(trainer):
        trainer.signal = signal.SIGINT

    with pytest.raises(Interrupted, match="after step 0") as stopped:
        train(run, settings, Watcher(), before=at_once)
    assert stopped.value.exit_code == 130
    _go_on(run)
    _assert_same(run, straight)


def test_a_run_killed_behind_its_last_checkpoint_only_saves_its_adapters(start, straight):
    run, settings = start()
    train(run, settings, Watcher())
    for folder in ("adapter", "last"):
        (run.folder / folder / "adapter_model.safetensors").unlink()
    _go_on(run)
    _assert_same(run, straight)


def test_a_run_that_had_lost_its_patience_does_not_train_on(start, tmp_path):
    never = tmp_path / "never.jsonl"  # answers that training makes ever less likely
    never.write_text('{"prompt": "w1", "completion": "QQQ"}\n{"prompt": "w2", "completion": "ZZZ"}\n')
    run, settings = start(patience=1, eval_steps=1, eval_data=[str(never)])
    first = train(run, settings, Watcher())
    assert first.stopped_early and first.progress.step < STEPS
    again = _go_on(run)
    assert again.stopped_early and again.progress.step == first.progress.step


def test_the_second_signal_would_end_the_process_at_once_and_afterwards_all_is_as_before(start):
    run, settings = start()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    during = []

    class Asked(Saboteur):
        def stopping(self):
            during.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))

    with pytest.raises(Interrupted):
        train(run, settings, Asked(signal_at=1, number=signal.SIGINT))
    assert during == [signal.SIG_DFL, signal.SIG_DFL]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_checkpoints_kept_are_as_many_as_asked_for(start):
    run, settings = start(steps=5, checkpoint_steps=1, keep_checkpoints=3)
    train(run, settings, Watcher())
    assert [path.name for path in list_checkpoints(run.checkpoints)] == [
        f"step-{step:08}.ckpt" for step in (5, 4, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "steps"), [(1e-9, (5, 4, 3)), (1000, (5,))])
def test_a_checkpoint_is_due_too_when_so_many_seconds_went_by_without_one(start, seconds, steps):
    run, settings = start(steps=5, checkpoint_steps=100, checkpoint_seconds=seconds, keep_checkpoints=3)
    train(run, settings, Watcher())
    assert [path.name for path in list_checkpoints(run.checkpoints)] == [f"step-{step:08}.ckpt" for step in steps]


def test_changed_data_is_refused_and_nothing_touched(start, chats, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_bytes(chats.read_bytes())
    run, settings = start(data=[str(data)])
    with pytest.raises(Interrupted):
        train(run, settings, Saboteur(signal_at=4))
    before = run.metrics.read_bytes()
    data.write_text(data.read_text().replace("w1", "x1"))
    with pytest.raises(UsageError, match=r"cannot go on exactly:\n  - the data changed(.|\n)*start a new run"):
        _go_on(run)
    assert run.metrics.read_bytes() == before
    data.unlink()
    with pytest.raises(DataError, match=r"No such data file.*chats\.jsonl"):
        _go_on(run)


def test_another_mix_of_the_same_files_is_other_data(start, chats, tmp_path):
    first, second = (tmp_path / f"{name}.jsonl" for name in "ab")
    lines = chats.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[: len(lines) // 2]))
    second.write_text("".join(lines[len(lines) // 2 :]))
    run, settings = start(data=[f"{first}::weight=1", f"{second}::weight=1"])
    with pytest.raises(Interrupted):
        train(run, settings, Saboteur(signal_at=4))
    run.config.write_text(run.config.read_text().replace("b.jsonl::weight=1", "b.jsonl::weight=3"))
    with pytest.raises(UsageError, match="the data changed"):
        _go_on(run)


def test_what_a_killed_process_left_half_written_is_removed(start, straight):
    run, settings = start()
    with pytest.raises(Killed):
        train(run, settings, Saboteur(kill_at=7))
    left = [run.checkpoints / ".step-00000006.ckpt.1.tmp", run.folder / ".probe-a", run.folder / ".adapter.b"]
    left[0].write_bytes(b"half")
    for folder in left[1:]:
        folder.mkdir()
    _go_on(run)
    assert not any(path.exists() for path in left)
    _assert_same(run, straight)


@pytest.mark.parametrize("text", ["rank: 4\n", "rank: [\n", "- 1\n"])
def test_a_config_that_was_damaged_is_said(start, text):
    run, _ = start()
    run.config.write_text(run.config.read_text().splitlines()[0] + "\n" + text)
    with pytest.raises(UsageError, match=r"config\.yaml does not hold the settings"):
        open_run(run.folder).settings()


def test_a_base_that_would_be_computed_in_another_way_is_refused(start, monkeypatch):
    run, settings = start(dropout=0.0)
    with pytest.raises(Killed):
        train(run, settings, Saboteur(kill_at=7))
    monkeypatch.setattr("deltaw.base.load.prove", lambda _: (None, None, "its kernels disagree here"))
    with pytest.raises(UsageError, match="the way of computing changed"):
        train(run, run.settings(), Saboteur(), resume=True)
    monkeypatch.undo()
    assert train(run, run.settings(), Saboteur(), resume=True).progress.step == STEPS


def test_every_setting_that_changed_is_listed_and_harmless_ones_do_not_stop_the_run(start, straight):
    run, settings = start()
    with pytest.raises(Interrupted):
        train(run, settings, Saboteur(signal_at=4))
    changed = run.settings()
    changed.lr, changed.seed, changed.keep_checkpoints = 1e-3, 7, 5
    with pytest.raises(UsageError) as refused:
        train(run, changed, Watcher(), resume=True)
    assert "lr was 0.02 and is 0.001" in str(refused.value) and "seed was 0 and is 7" in str(refused.value)
    harmless, watcher = run.settings(), Saboteur()
    harmless.keep_checkpoints = 5
    train(run, harmless, watcher, resume=True)
    assert "Going on although keep_checkpoints was 2 and is 5." in watcher.said
    _assert_same(run, straight)


def test_a_run_is_trained_by_one_process_at_a_time(start):
    run, settings = start()
    with run.locked(), pytest.raises(UsageError, match="Another process is training"):
        train(run, settings, Watcher())
    with run.locked():
        pass


def test_a_step_under_way_is_abandoned_at_once_and_done_again_on_resume(start, straight):
    """The signal comes within the forward pass of step 5, in the first layer that is called."""
    run, settings = start()
    signalled, later = [], []

    def in_the_middle(trainer):
        def press(*_):
            later.extend(signalled)
            if trainer.progress.step == 4 and trainer.progress.abandonable and not signalled:
                signalled.append(True)
                os.kill(os.getpid(), signal.SIGTERM)

        for layer in trainer.ready.base.model.model.layers:
            layer.mlp.register_forward_pre_hook(press)

    with pytest.raises(Interrupted, match="after step 4"):
        train(run, settings, Watcher(), before=in_the_middle)
    assert signalled and not later, "no layer was called after the signal"
    _go_on(run)
    _assert_same(run, straight)


def test_an_evaluation_under_way_is_abandoned_and_done_first_on_resume(start, straight):
    run, settings = start()

    def in_the_evaluation(trainer):
        def press(*_):
            if trainer.owed and trainer.progress.step == 6 and trainer.signal is None:
                os.kill(os.getpid(), signal.SIGINT)

        trainer.ready.base.model.model.layers[0].mlp.register_forward_pre_hook(press)

    with pytest.raises(Interrupted, match="after step 6"):
        train(run, settings, Watcher(), before=in_the_evaluation)
    assert not any(line["step"] == 6 and "eval_loss" in line for line in read_metrics(run.metrics))
    _go_on(run)
    _assert_same(run, straight)


def test_a_signal_before_an_evaluation_that_is_due_does_not_wait_for_it(start, straight):
    run, settings = start()
    seen = []

    class Stopping(Watcher):
        def step(self, line, progress, length):
            if line["step"] == 6:
                os.kill(os.getpid(), signal.SIGTERM)

        def evaluation(self, line, best):
            seen.append(line["step"])

    with pytest.raises(Interrupted, match="after step 6"):
        train(run, settings, Stopping())
    assert seen == [2, 4]
    _go_on(run)
    _assert_same(run, straight)


def test_a_run_whose_talk_cannot_be_written_saves_its_state(start, straight):
    class Full(Watcher):
        def step(self, line, progress, length):
            if line["step"] == 5:
                raise OSError(28, "No space left on device")

    run, settings = start()
    with pytest.raises(DiskError, match="No space left on device"):
        train(run, settings, Full())
    assert list_checkpoints(run.checkpoints)[0].name == "step-00000005.ckpt"
    _go_on(run)
    _assert_same(run, straight)


def test_a_killed_run_of_minutes_repeats_the_rates_that_it_had(start):
    """Steps behind the last checkpoint are done again with what the clock decided the first time."""
    run, settings = start(steps=None, minutes=1.0, eval_steps=3, checkpoint_steps=4)
    with pytest.raises(Killed):
        train(run, settings, Saboteur(kill_at=6))
    before = [line for line in read_metrics(run.metrics) if "loss" in line]
    with pytest.raises(Killed):
        _go_on(run, Saboteur(kill_at=9))
    after = [line for line in read_metrics(run.metrics) if "loss" in line][: len(before)]
    for key in ("step", "loss", "lr", "grad_norm", "seconds"):
        assert [line[key] for line in before] == [line[key] for line in after], key


def test_what_follows_a_torn_line_of_the_clock_is_not_lost(tmp_path):
    path = tmp_path / "clock.jsonl"
    first = WrittenClock(path)
    for step in (1, 2):
        first.done(step, step / 10)
        first.seconds(step, float(step))
    path.write_text(path.read_text() + '{"step": 3, "do')
    second = WrittenClock(path)
    second.done(3, 0.35)
    second.seconds(3, 7.0)
    third = WrittenClock(path)
    assert [third.done(step, 0.9) for step in (1, 2, 3, 4)] == [0.1, 0.2, 0.35, 0.9]
    assert [third.seconds(step, 9.0) for step in (1, 2, 3)] == [1.0, 2.0, 7.0]


def test_resuming_what_another_process_trains_leaves_its_files_alone(start):
    run, _ = start()
    run.write_summary({"status": "running", "verb": "train"})
    with run.locked(), pytest.raises(UsageError, match="Another process is training"):
        training.train(resume=run.folder)
    assert run.read_summary() == {"status": "running", "verb": "train"} and not run.report.exists()


def test_a_loss_that_jumps_and_a_gradient_that_is_zero_are_said_and_kept(start):
    run, settings = start()
    said = []

    class Listening(Watcher):
        def start(self, trainer):
            self.trainer = trainer

        def say(self, text):
            said.append(text)

    watcher = Listening()
    train(run, settings, watcher)
    trainer = watcher.trainer
    trainer.losses = [1.0] * 20
    trainer._notice(StepRecord(21, [4.5], [10], [10], [5], [0.0], [1e-3], 0.1))
    assert said[-2:] == [
        "Step 21: the loss jumped to 4.5; lately it was about 1.",
        "Step 21: the gradient is zero, so nothing was learned from it.",
    ]


def test_factors_that_are_not_finite_are_never_checkpointed(start):
    run, settings = start()

    def ruin(trainer):
        trainer.flat.optimizer.register_step_post_hook(lambda *_: trainer.flat.master[0].fill_(float("inf")))

    with pytest.raises(NotFiniteError, match=r"(not finite|the loss is)"):
        train(run, settings, Watcher(), before=ruin)
    assert not list_checkpoints(run.checkpoints)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"not a run folder: it has no config\.yaml"):
        open_run(tmp_path)
