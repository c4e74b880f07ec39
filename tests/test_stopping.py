"""A run that is asked to stop finishes its step, keeps it, and can go on from there."""

from __future__ import annotations

import dataclasses
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.runs import content, digits, grpo_config, sft_config, train_with_digits
from transformers import AutoModelForCausalLM

from rlcore import cli
from rlcore.errors import TrainingStopped
from rlcore.runs.checkpoint import checkpoints
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import sft
from rlcore.trainers.grpo import train_grpo
from rlcore.trainers.sft import train_sft
from rlcore.trainers.shared.stopping import stop_request


def send_in_step(monkeypatch, step: int, *signals: signal.Signals) -> None:
    """These signals reach this process in the middle of that optimizer step of SFT."""
    train_step = sft._train_step

    def spy(run, number, examples):
        for sent in signals if number == step else ():
            os.kill(os.getpid(), sent)
        return train_step(run, number, examples)

    monkeypatch.setattr(sft, "_train_step", spy)


def model_bytes(directory: Path) -> bytes:
    return (Path(directory) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_exactly(tmp_path, monkeypatch, name):
    config = sft_config(tmp_path)
    whole = train_sft(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        send_in_step(patched, 3, signal.Signals[name])
        with pytest.raises(TrainingStopped, match=f"{name} after step 3.*checkpoint-3") as caught:
            train_sft(config)
    assert caught.value.checkpoint == tmp_path / "run" / "checkpoint-3"
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [3]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    train_sft(dataclasses.replace(config, resume=True))
    assert model_bytes(tmp_path / "run") == model_bytes(whole.output_dir)


def test_of_two_signals_the_first_is_the_reason():
    with stop_request() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert request.signal == signal.SIGTERM


def test_a_generation_batch_is_finished_first(tmp_path):
    config = grpo_config(tmp_path)
    whole = train_with_digits(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))

    def stopping(prompts, completions, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return digits(prompts, completions)

    with pytest.raises(TrainingStopped, match=r"after step 2.*checkpoint-2"):
        train_grpo(config, reward_funcs=[stopping])
    train_with_digits(dataclasses.replace(config, resume=True))
    assert model_bytes(tmp_path / "run") == model_bytes(whole.output_dir)


def test_a_second_ctrl_c_stops_at_once_but_not_the_one_that_a_launcher_passes_on(
    tmp_path, monkeypatch
):
    config = sft_config(tmp_path)
    with monkeypatch.context() as patched:
        send_in_step(patched, 2, signal.SIGINT, signal.SIGINT)
        with pytest.raises(TrainingStopped):
            train_sft(config)
    monkeypatch.setattr("rlcore.trainers.shared.stopping._ONE_CTRL_C", 0.0)
    send_in_step(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        train_sft(dataclasses.replace(config, resume=True))
    assert type(caught.value) is KeyboardInterrupt
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2]


def test_a_signal_in_the_last_step_comes_after_the_model_is_saved(tmp_path, monkeypatch):
    send_in_step(monkeypatch, 4, signal.SIGTERM)
    with pytest.raises(TrainingStopped, match=r"the last one, and the model in .* is whole"):
        train_sft(sft_config(tmp_path))
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_signals_do_what_they_did_before_and_after_a_run(tmp_path):
    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    with stop_request() as request:
        assert all(signal.getsignal(number) == request.receive for number in before)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_that_is_ignored_or_handled_by_the_caller_stays_so():
    heard = []
    handler = lambda *arguments: heard.append(arguments)  # noqa: E731
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, handler)
    try:
        with stop_request() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 1
        assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, old[0])
        signal.signal(signal.SIGTERM, old[1])


def test_a_run_in_a_thread_of_the_callers_is_not_in_the_way(tmp_path):
    results = []
    config = sft_config(tmp_path, max_steps=1)
    thread = threading.Thread(target=lambda: results.append(train_sft(config)))
    thread.start()
    thread.join()
    assert results[0].steps == 1


@pytest.mark.parametrize(("steps", "saved"), [(4, [3, 4]), (10, [9, 10]), (25, [21, 24]), (1, [1])])
def test_by_default_a_tenth_of_the_run_is_lost_at_most_and_two_checkpoints_stay(
    tmp_path, steps, saved
):
    train_sft(sft_config(tmp_path, max_steps=steps, save_steps=None))
    assert [step for step, _ in checkpoints(tmp_path / "run")] == saved


def test_checkpoints_that_were_asked_for_all_stay(tmp_path):
    train_sft(sft_config(tmp_path, save_steps=1))
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [1, 2, 3, 4]
    train_sft(sft_config(tmp_path, save_steps=0, output_dir=str(tmp_path / "none")))
    assert checkpoints(tmp_path / "none") == []


def words(config: sft.SFTConfig) -> list[str]:
    names = ("model", "dataset", "output_dir", "max_steps", "save_steps", "lr_scheduler_type")
    values = {f"--{name}": str(getattr(config, name)) for name in names}
    return ["train", "sft", *(word for pair in values.items() for word in pair)]


@pytest.mark.parametrize(
    ("sent", "status", "shown"),
    [
        (
            (signal.SIGTERM,),
            143,
            "checkpoint-2 holds the run so far; the same command with "
            "--resume goes on from checkpoint-2",
        ),
        ((signal.SIGINT,), 130, "the same command with --resume goes on"),
    ],
)
def test_the_command_line_says_what_was_kept_and_how_to_go_on(
    tmp_path, monkeypatch, capsys, sent, status, shown
):
    with monkeypatch.context() as patched:
        send_in_step(patched, 2, *sent)
        assert cli.main(words(sft_config(tmp_path))) == status
    assert shown in capsys.readouterr().err
    assert cli.main([*words(sft_config(tmp_path)), "--resume"]) == 0


def test_ctrl_c_advises_to_resume_only_where_there_is_something(tmp_path, monkeypatch, capsys):
    def interrupt(run, step, examples):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "_train_step", interrupt)
    assert cli.main(words(sft_config(tmp_path))) == 130
    shown = capsys.readouterr().err
    assert "interrupted" in shown and "resume" not in shown
    assert not (tmp_path / "run").exists()


def test_a_terminal_that_goes_away_costs_nothing(tmp_path):
    config = sft_config(tmp_path, max_steps=100_000)
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlcore", *words(config)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0),  # TIOCSCTTY
    )
    os.close(terminal)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        os.set_blocking(main, False)
        try:
            os.read(main, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(main)
    assert process.wait(60) == 128 + signal.SIGHUP
    ((step, path),) = checkpoints(tmp_path / "run")
    assert read_metrics(metrics)[-1]["step"] == step
    assert "model.safetensors" in content(path)
