"""The command line, from flags to a trained model, and from a mistake to one clear sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

import rlcore
from rlcore import cli
from rlcore.cli import COMMANDS, Command, main
from rlcore.demo.arithmetic import make_task
from rlcore.errors import TrainingDiverged, UserError
from rlcore.runs import checkpoint
from rlcore.runs.options import options
from rlcore.sampling.rewards import REWARDS
from rlcore.trainers import sft
from rlcore.trainers.options.grpo import LOSS_TYPES, GRPOConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"), sft_rows=32, train_rows=16, test_rows=4)


@pytest.fixture
def sft_flags(task, tmp_path):
    return {
        "--model": str(task.model),
        "--dataset": str(task.sft),
        "--output-dir": str(tmp_path / "run"),
        "--max-steps": "2",
        "--per-device-train-batch-size": "4",
    }


@pytest.fixture
def grpo_flags(sft_flags, task):
    return sft_flags | {
        "--dataset": str(task.train),
        "--num-generations": "4",
        "--max_completion_length": "6",
        "--reward": "arithmetic",
    }


def words(flags: dict[str, str]) -> list[str]:
    return [word for flag in flags.items() for word in flag]


def failure(capsys, arguments: list[str]) -> str:
    """The message of a command line that must fail with status 2: one sentence, no traceback."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line.removeprefix("error: ")


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_sft_trains_a_model_that_transformers_loads(capsys, sft_flags, tmp_path):
    assert main(["train", "sft", *words(sft_flags)]) == 0
    out = capsys.readouterr().out
    run = tmp_path / "run"
    assert out == f"model and metrics.jsonl are in {run}\nnext: rlcore chat {run}\n"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_grpo_trains_on_a_file_and_a_reward_of_the_users_own(grpo_flags, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, answer, **_):\n"
        "    assert len(answer) == len(completions)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = grpo_flags | {"--reward": "my_rewards:length", "--output-dir": "out"}
    assert main(["train", "grpo", *words(flags)]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    last = metrics(tmp_path / "out")[-1]
    assert last["step"] == 2
    assert last["reward"] == pytest.approx(last["rewards/length/mean"])
    for name in ("loss", "reward_std", "entropy", "completions/mean_length", "tokens_per_second"):
        assert name in last


def test_a_yaml_file_gives_the_options_and_flags_win(sft_flags, tmp_path):
    config = {flag[2:].replace("-", "_"): value for flag, value in sft_flags.items()}
    (tmp_path / "run.yaml").write_text(json.dumps(config | {"max_steps": 50}))
    yaml = ["--config", str(tmp_path / "run.yaml")]
    assert main(["train", "sft", *yaml, "--max-steps", "1"]) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]


def test_an_unknown_flag_names_the_nearest(capsys, sft_flags):
    message = failure(capsys, ["train", "sft", *words(sft_flags), "--lerning-rate", "1"])
    assert message == "unknown flag --lerning-rate; did you mean --learning-rate?"


def test_an_unknown_yaml_key_names_file_and_nearest(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lerning_rate: 1\n")
    message = failure(capsys, ["train", "sft", "--config", str(path)])
    assert message == f"config {path}: unknown key 'lerning_rate'; did you mean 'learning_rate'?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "sft"], "Did you mean 'train sft'?"),
        (["train", "--foo"], "train sft, train pg"),
        (["train", "dop"], "unknown command 'train dop'"),
        (["--foo"], "unknown command '--foo'"),
        (["sft", "--model", "x"], "Did you mean 'train sft'?"),
        (["static"], "Did you mean 'bench static'?"),
        (["train", "sft"], "required, but not given: --model, --dataset, --output-dir"),
        (["train", "sft", "--config"], "--config needs a YAML file"),
        (["train", "sft", "--config=a", "--config", "b"], "--config is given twice"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(capsys, arguments, message):
    assert message in failure(capsys, arguments)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"--model": "/nowhere/model"}, ["/nowhere/model"]),
        ({"--dataset": "/nowhere/rows.jsonl"}, ["/nowhere/rows.jsonl"]),
        ({"--reward": "exakt_match"}, ["exakt_match", "exact_match"]),
        ({"--reward": "bad_rewards:raises"}, ["raises", "no such luck"]),
        ({"--reward": "bad_rewards:too_few"}, ["too_few", "1", "4"]),
        ({"--reward": "bad_rewards:words"}, ["words", "good"]),
        ({"--reward": "bad_rewards:absent"}, ["absent"]),
        ({"--reward": "no_such_module:f"}, ["no_such_module"]),
        ({"--num-generations": "3"}, ["num_generations"]),
        ({"--loss-type": "drgrpo"}, ["drgrpo", "dr_grpo"]),
        ({"--learning-rate": "-1"}, ["learning_rate"]),
        ({"--report-to": "wandbb"}, ["wandbb", "wandb"]),
    ],
)
def test_bad_input_to_grpo_is_one_sentence_and_leaves_nothing(
    capsys, grpo_flags, tmp_path, monkeypatch, change, expected
):
    (tmp_path / "bad_rewards.py").write_text(
        "def raises(prompts, completions, **_): raise RuntimeError('no such luck')\n"
        "def too_few(prompts, completions, **_): return [1.0]\n"
        "def words(prompts, completions, **_): return ['good'] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    message = failure(capsys, ["train", "grpo", *words(grpo_flags | change)])
    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_malformed_line_is_named_by_file_and_number(capsys, sft_flags, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n')
    message = failure(capsys, ["train", "sft", *words(sft_flags | {"--dataset": str(rows)})])
    assert f"{rows}:2" in message or (str(rows) in message and "line 2" in message)
    assert not (tmp_path / "run").exists()


def test_a_second_run_does_not_touch_the_first(capsys, sft_flags, tmp_path):
    assert main(["train", "sft", *words(sft_flags)]) == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert "is not empty" in failure(capsys, ["train", "sft", *words(sft_flags)])
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert main(["train", "sft", *words(sft_flags), "--overwrite-output-dir"]) == 0


def test_a_diverging_run_stops_and_names_step_quantity_and_last_good_checkpoint(
    capsys, sft_flags, tmp_path, monkeypatch
):
    loss = sft._loss

    def spoiled(run, batch, num_items):
        steps_done = len(metrics(tmp_path / "run"))
        return loss(run, batch, num_items) * (float("nan") if steps_done == 3 else 1.0)

    monkeypatch.setattr(sft, "_loss", spoiled)
    flags = sft_flags | {"--max-steps": "20", "--save-steps": "1"}
    assert main(["train", "sft", *words(flags)]) == 1
    (message,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    directory = tmp_path / "run"
    assert "step 4: loss is nan" in message
    assert f"the last good checkpoint is {directory / 'checkpoint-3'}" in message
    assert not (directory / "config.json").exists()
    assert [row["step"] for row in metrics(directory)] == [1, 2, 3]


def test_a_run_that_diverges_at_once_saves_nothing_and_says_so(capsys, sft_flags, tmp_path):
    flags = sft_flags | {"--learning-rate": "1e38", "--max-steps": "20", "--save-steps": "1"}
    assert main(["train", "sft", *words(flags), "--lr-scheduler-type", "constant"]) == 1
    (message,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message.startswith("error: step 1: ")
    assert re.search(r" is (nan|-?inf);", message)
    assert message.endswith("no checkpoint was saved before it")
    assert checkpoint.last_checkpoint(tmp_path / "run") is None
    assert not (tmp_path / "run" / "config.json").exists()


@dataclass
class NoOptions:
    """Options."""

    raises: str = ""


def raise_user_error(config):
    raise UserError("try another file")


def raise_divergence(config):
    raise TrainingDiverged(3, "loss", float("nan"), "runs/checkpoint-2")


def raise_interrupt(config):
    raise KeyboardInterrupt


def raise_bug(config):
    raise ValueError("a bug of ours")


@pytest.fixture
def command(monkeypatch):
    def add(function):
        fake = Command(__name__, "NoOptions", function.__name__, "for the test")
        monkeypatch.setitem(COMMANDS, "fake", fake)
        monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
        return main(["fake"])

    return add


def test_each_kind_of_failure_has_its_status(capsys, command):
    assert command(raise_user_error) == 2
    assert capsys.readouterr().err == "error: try another file\n"
    assert command(raise_divergence) == 1
    shown = capsys.readouterr().err
    assert "step 3" in shown and "loss is nan" in shown and "runs/checkpoint-2" in shown
    assert command(raise_interrupt) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_of_the_librarys_keeps_its_traceback(command):
    with pytest.raises(ValueError, match="a bug of ours"):
        command(raise_bug)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["train"], ["train", "--help"]])
def test_help_lists_every_command(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_the_help_of_a_command_has_one_line_a_flag_with_its_default(capsys):
    assert main(["train", "grpo", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.strip().startswith("--num-generations int")]
    assert line.endswith("[8]")
    assert "completions" in line
    (line,) = [line for line in lines if line.strip().startswith("--model str")]
    assert line.endswith("required")
    for name in ("train sft", "train grpo", "demo"):
        assert main([*name.split(), "--help"]) == 0
        flags = [line for line in capsys.readouterr().out.splitlines() if "  --" in line]
        # name, type and default are there by themselves; the words are the author's
        assert all(len(line.split("  ")) >= 3 for line in flags)


def test_help_fits_a_terminal_and_leaves_words_whole(capsys, monkeypatch):
    monkeypatch.setattr(cli, "Console", lambda: Console(force_terminal=True, width=80))
    assert main(["train", "grpo", "--help"]) == 0
    shown = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    assert "--seed int of data order, dropout and sampling [0]" in text
    column = next(line.index("of data") for line in shown.splitlines() if "--seed int" in line)
    wrapped = [
        line for line in shown.splitlines() if line.rstrip().endswith("start from  required")
    ]
    assert [len(line) - len(line.lstrip()) for line in wrapped] == [column]


def test_help_names_every_choice_of_a_loss_and_a_reward():
    helps = {option.name: option.help for option in options(GRPOConfig)}
    assert all(name in helps["loss_type"] for name in LOSS_TYPES)
    assert all(name in helps["reward"] for name in REWARDS)


def test_help_shows_how_to_switch_off_what_is_on(capsys):
    assert main(["bench", "--help"]) == 0
    assert "  --[no-]memory " in capsys.readouterr().out


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "error::SyntaxWarning"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_python_dash_m_is_the_command():
    shown = run("-m", "rlcore", "--version")
    assert (shown.returncode, shown.stdout) == (0, f"rlcore {rlcore.__version__}\n")
    failed = run("-m", "rlcore", "demo", "--sed", "1")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: unknown flag --sed; did you mean --seed?\n"


def test_help_does_not_wait_for_transformers():
    code = (
        "import sys; from rlcore.cli import main;"
        "main(['--help']); assert 'torch' not in sys.modules;"
        "main(['train', 'grpo', '--help']); assert 'transformers' not in sys.modules"
    )
    shown = run("-c", code)
    assert shown.returncode == 0, shown.stderr
