"""The commands that look at models and runs: eval, chat, compare, env."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_tiny
from rich.console import Console
from transformers import AutoTokenizer

from rlcore.cli import main
from rlcore.commands import chat as chat_module
from rlcore.commands.chat import ChatConfig, chat
from rlcore.commands.compare import CompareConfig, compare
from rlcore.commands.evaluate import EvalConfig, evaluate_models
from rlcore.errors import UserError
from rlcore.runs.reading import read_run
from rlcore.trainers.sft import SFTConfig, train_sft

CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
PROMPTS = [f"{n}+1=" for n in range(7)]


def digits(prompts, completions, **_):
    """The share of digits among an answer's characters."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def longest(prompts, completions, answer, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two models, data with a held-out file, and two finished runs."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(["one", "other"]):
        save_tiny(home / name, initializer_range=0.05, seed=seed)
    rows = [{"prompt": prompt, "completion": "8"} for prompt in PROMPTS]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "held.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
    config = SFTConfig(
        model=str(home / "one"),
        dataset=str(home / "rows.jsonl"),
        eval_dataset=str(home / "held.jsonl"),
        output_dir=str(home / "fast"),
        eval_steps=2,
        max_steps=4,
        save_steps=0,
        learning_rate=1e-2,
    )
    train_sft(config)
    train_sft(dataclasses.replace(config, output_dir=str(home / "slow"), learning_rate=1e-5))
    return home


def console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def config_of(home: Path, *models: str, **changes) -> EvalConfig:
    changes = {"reward": ["test_commands:digits"], "max_completion_length": 4} | changes
    models = [str(home / name) for name in models]
    return EvalConfig(model=models, dataset=str(home / "rows.jsonl"), **changes)


def test_eval_counts_what_every_answer_got(home, tmp_path):
    output = tmp_path / "answers.jsonl"
    screen = console()
    config = config_of(
        home, "one", "other", num_samples=3, pass_at=[1, 3], pass_reward=0.4, batch_size=2,
        limit=5, output=str(output),
    )  # fmt: skip
    found = evaluate_models(config, screen)
    answers = [json.loads(line) for line in output.open()]
    assert len(answers) == 2 * 5 * (1 + 3)
    for model, evaluation in zip(config.model, found, strict=True):
        for answer in answers:
            assert answer["reward"] == pytest.approx(digits([], [answer["completion"]])[0])
            assert answer["prompt"] == PROMPTS[answer["row"]]
        got = {
            kind: torch.tensor([
                [a["reward"] for a in answers
                 if (a["model"], a["kind"], a["row"]) == (model, kind, row)]
                for row in range(5)
            ]).double()
            for kind in ("greedy", "sampled")
        }  # fmt: skip
        assert evaluation.scores["greedy"].tolist() == got["greedy"][:, 0].tolist()
        assert evaluation.scores["mean@3"].tolist() == pytest.approx(
            got["sampled"].mean(1).tolist()
        )
        passed = got["sampled"] >= 0.4
        assert evaluation.scores["pass@3"].tolist() == passed.any(1).double().tolist()
        assert evaluation.scores["pass@1"].tolist() == pytest.approx(
            passed.double().mean(1).tolist()
        )
    lines = screen.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert f"{found[0].scores['greedy'].mean():.3f}" in "".join(lines)
    assert "minus the first" in "".join(lines)


def test_the_batch_size_changes_no_answer_and_the_seed_only_what_is_sampled(home):
    def scores(**changes):
        config = config_of(home, "one", num_samples=2, temperature=5.0, **changes)
        return evaluate_models(config, console())[0].scores

    first, again, other = scores(), scores(), scores(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["greedy"], other["greedy"])
    assert not torch.equal(first["mean@2"], other["mean@2"])
    assert torch.equal(first["greedy"], scores(batch_size=3)["greedy"])


def test_eval_takes_checkpoints_and_the_best_of_a_run(home):
    best = home / "fast" / "best"
    found = evaluate_models(config_of(home, "one", "fast/best"), console())
    assert best.is_dir() and found[1].scores["greedy"].mean() > found[0].scores["greedy"].mean()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": []}, "no reward: give --reward"),
        ({"pass_at": [2]}, "pass_at 2 must be from 1 to num_samples, which is 0"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries for 1 reward"),
        ({"output": "rows.jsonl"}, "exists: choose another"),
        ({"output": "nowhere/a.jsonl"}, "there is no directory"),
        ({"reward": ["test_commands:longest"]}, "'longest' cannot be called with"),
        ({"dataset": "none.jsonl"}, "none.jsonl"),
    ],
)
def test_eval_says_what_does_not_work_before_it_answers(home, changes, said, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=said):
        evaluate_models(dataclasses.replace(config_of(home, "one"), **changes), console())


def test_eval_leaves_no_half_written_answers(home, tmp_path):
    with pytest.raises(UserError):
        evaluate_models(config_of(home, "one", "absent", output=str(tmp_path / "a")), console())
    assert not list(tmp_path.iterdir())


def test_chat_answers_each_line_as_a_text_and_scores_it(home, capsys):
    config = ChatConfig(
        model=str(home / "one"), temperature=0, max_completion_length=4,
        reward=["test_commands:digits"],
    )  # fmt: skip
    chat(config, iter(["1+1=\n", "\n", "2+1=\n", "/quit\n", "3+1=\n"]))
    lines = capsys.readouterr().out.splitlines()
    greedy = evaluate_models(config_of(home, "one"), console())[0].scores["greedy"]
    scores = [line for line in lines if line.startswith("reward ")]
    assert scores == [f"reward {greedy[row]:.3f}" for row in (1, 2)]


@pytest.fixture
def talker(home, tmp_path) -> str:
    """A model whose tokenizer has a chat template."""
    model = save_tiny(tmp_path / "talker", initializer_range=0.05)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    return str(model)


def test_a_conversation_remembers_until_another_begins(talker, monkeypatch):
    asked = []

    def answer(config, model, tokenizer, prompt):
        asked.append([message["content"] for message in prompt])
        return "yes", [1]

    monkeypatch.setattr(chat_module, "_answer", answer)
    chat(ChatConfig(model=talker, system="be brief"), iter(["a", "b", "/new", "c"]))
    assert asked == [["be brief", "a"], ["be brief", "a", "yes", "b"], ["be brief", "c"]]


def test_chat_says_where_there_is_no_room(home, capsys):
    chat(ChatConfig(model=str(home / "one"), temperature=0), iter(["1" * 4000]))
    assert "no room for an answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"system": "be brief"}, "has no chat template"),
        ({"reward": ["exact_match"]}, "cannot be called with"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_chat_says_what_does_not_work(home, changes, said):
    with pytest.raises(UserError, match=said):
        chat(ChatConfig(model=str(home / "one"), **changes), iter([]))


@pytest.mark.parametrize("width", [60, 80])
def test_compare_shows_what_differs_and_who_did_better(home, width):
    screen = console(width)
    compare(CompareConfig(runs=[str(home / "fast"), str(home / "slow")]), screen)
    lines = screen.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    (rates,) = [line for line in lines if line.startswith("learning_rate")]
    assert "0.01" in rates and "1e-05" in rates
    assert not any(line.startswith("max_steps") for line in lines), "alike"
    fast = read_run(home / "fast")
    step, best = fast.best("eval/loss")
    assert best == min(value for _, value in fast.course("eval/loss")) and step in (2, 4)
    curves = [line for line in lines if set(line) & set("▂▃▄▅▆▇█")]
    assert "▁" in curves[0] and "▁" not in curves[1], "on one scale"


def test_compare_names_what_is_no_run_and_a_metric_that_none_has(home):
    with pytest.raises(UserError, match=r"no run at .*one.*no metrics\.jsonl"):
        compare(CompareConfig(runs=[str(home / "one")]))
    with pytest.raises(UserError, match=r"unknown metric 'eval/los'.* Did you mean 'eval/loss'"):
        compare(CompareConfig(runs=[str(home / "fast")], metric=["eval/los"]))


def test_env_is_a_block_of_versions(capsys, monkeypatch):
    monkeypatch.setenv("RLCORE_BACKEND", "torch")
    assert main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__ and lines["RLCORE_BACKEND"] == "torch"
