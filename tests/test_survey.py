"""`rlcore demo --all`, shortened: every method runs, is measured, and is not run again."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from rlcore.demo import arithmetic, recipes, survey, survey_report
from rlcore.demo.demo import DemoConfig, demo
from rlcore.demo.filling import Filling
from rlcore.demo.survey import METHODS, SAMPLES, Measurement, Outcome, run_survey
from rlcore.demo.survey_report import Survey, show
from rlcore.errors import UserError
from rlcore.runs.checkpoint import checkpoints
from rlcore.runs.display import Display
from rlcore.trainers.dpo import DPOConfig


@pytest.fixture
def short(monkeypatch):
    """The task and the recipes, cut down to a few rows and steps."""
    make_task = arithmetic.make_task
    sft, reward_model = recipes.sft_config, recipes.reward_model_config

    def cut(recipe):
        def shortened(*arguments):
            config = recipe(*arguments)
            rows = 4 if isinstance(config, DPOConfig) else 16
            return dataclasses.replace(config, max_steps=4, per_device_train_batch_size=rows)

        return shortened

    def short_sft(*arguments):
        return dataclasses.replace(sft(*arguments), max_steps=60, warmup_steps=0, save_steps=0)

    def short_reward_model(*arguments):
        return dataclasses.replace(reward_model(*arguments), max_steps=2, save_steps=0)

    monkeypatch.setattr(
        arithmetic,
        "make_task",
        lambda *arguments: make_task(*arguments, sft_rows=256, train_rows=32, test_rows=8),
    )
    monkeypatch.setattr(arithmetic, "make_pairs", _pairs_by_hand)
    monkeypatch.setattr(recipes, "sft_config", short_sft)
    monkeypatch.setattr(recipes, "reward_model_config", short_reward_model)
    monkeypatch.setattr(survey, "MEASUREMENTS", 2)
    monkeypatch.setattr(survey, "KL_ROWS", 8)
    for name, method in METHODS.items():
        short_method = dataclasses.replace(method, recipe=cut(method.recipe))
        monkeypatch.setitem(METHODS, name, short_method)


def _pairs_by_hand(paths, model, directory, seed):
    """A model of sixty steps is hardly ever right: its pairs would be none."""
    written = arithmetic.pair_paths(directory)
    rows = [json.loads(line) for line in paths.train.read_text().splitlines()[:16]]
    pairs = [
        {"prompt": row["prompt"], "chosen": f"{row['first_step']}, 1+1=2", "rejected": " 1"}
        for row in rows
    ]
    for path, some in ((written.train, pairs), (written.test, pairs[:-1])):
        path.write_text("".join(json.dumps(pair) + "\n" for pair in some))
    return written


def screen() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_every_method_runs_from_one_start_and_only_once(short, tmp_path, monkeypatch):
    console = screen()
    outcomes = run_survey(tmp_path / "all", range(7, 8), console=console)
    assert set(outcomes) == set(METHODS)
    starts = {(o.curve[0].greedy, o.curve[0].sampled) for (o,) in outcomes.values()}
    assert len(starts) == 1
    for name, (outcome,) in outcomes.items():
        assert [m.samples for m in outcome.curve] == [0, SAMPLES / 2, SAMPLES], name
        assert outcome.curve[0].kl == pytest.approx(0, abs=1e-6)
        assert outcome.curve[-1].kl >= 0 and outcome.seconds > 0, name
    assert outcomes["dpo"][0].curve[-1].kl > 0.01
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    assert results["seeds"] == [7]
    (dpo,) = outcomes["dpo"]
    assert results["methods"]["dpo"] == [json.loads(json.dumps(dataclasses.asdict(dpo)))]
    assert (tmp_path / "all" / "survey.png").read_bytes().startswith(b"\x89PNG")
    shown = console.file.getvalue()
    table = (tmp_path / "all" / "survey.md").read_text()
    for text in ("PG", "TRPO", "PPO-penalty", "PPO-clip", "GRPO", "DPO", "reward model", "5120"):
        assert text in shown and text in table

    def again(*_):
        raise AssertionError("trained a second time")

    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, dataclasses.replace(method, train=again))
    monkeypatch.setattr(survey, "train_sft", again)
    monkeypatch.setattr(survey, "train_reward_model", again)
    assert run_survey(tmp_path / "all", range(7, 8), console=screen()) == outcomes


def test_a_run_that_was_cut_off_goes_on_from_its_last_checkpoint(short, tmp_path, monkeypatch):
    names = ("grpo",)
    monkeypatch.setattr(survey, "METHODS", {name: METHODS[name] for name in names})
    whole = run_survey(tmp_path / "all", range(1), console=screen())
    run = tmp_path / "all" / "seed0" / "grpo"
    (run / "outcome.json").unlink()
    (run / "config.json").unlink()
    assert [step for step, _ in checkpoints(run)] == [2, 4]
    resumed = []
    method = METHODS["grpo"]

    def watched(config):
        resumed.append(config.resume)
        return method.train(config)

    monkeypatch.setitem(survey.METHODS, "grpo", dataclasses.replace(method, train=watched))
    again = run_survey(tmp_path / "all", range(1), console=screen())
    assert resumed == [True]
    assert again["grpo"][0].curve == whole["grpo"][0].curve


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dpo"])
def test_every_method_learns_from_as_many_samples(name, tmp_path):
    paths = arithmetic.task_paths(tmp_path)
    start = survey.Start(paths, tmp_path, arithmetic.pair_paths(tmp_path), tmp_path)
    config = METHODS[name].recipe(start, tmp_path / name, 3)
    assert config.seed == 3 and config.model == str(start.sft)
    batches = config.max_steps / config.steps_per_batch
    assert batches * config.completions_per_process == SAMPLES


ROW = re.compile(
    r"^\| ([\w-]+) \| ([\w ]+) \| [\d.]+ \((\.\d+)-(\.\d+)\) \| [\d.]+ \((\.\d+)-(\.\d+)\)", re.M
)


@pytest.mark.parametrize("page", ["README.md", "docs/survey.md"])
def test_the_ranges_are_those_of_the_pages(page):
    cells = ROW.findall((Path(__file__).parents[1] / page).read_text(encoding="utf-8"))
    numbers = {(label, judge): tuple(map(float, ends)) for label, judge, *ends in cells}
    written = {key: (ends[:2], ends[2:]) for key, ends in numbers.items()}
    assert written == survey_report.PUBLISHED
    assert {(m.label, m.judge) for m in METHODS.values()} == written.keys()


def test_each_method_is_told_as_it_ends_beside_the_ranges_and_what_is_outside():
    end = Measurement(samples=5120, greedy=0.9861, sampled=0.77, kl=0.2)
    assert survey_report.came_out(5, 8, METHODS["grpo"], end) == (
        "5 of 8: GRPO on the verifier: greedy 0.986 (.977-.992), sampled 0.770 (.766-.832)"
    )
    end = dataclasses.replace(end, greedy=0.9769, sampled=0.9)
    told = survey_report.came_out(5, 8, METHODS["grpo"], end)
    assert told.endswith("greedy 0.977 (.977-.992), sampled 0.900 (.766-.832)!")


def test_the_end_says_what_is_outside_the_ranges():
    ends = {
        name: Measurement(
            SAMPLES, *(low for low, _ in survey_report.PUBLISHED[m.label, m.judge]), 0
        )
        for name, m in METHODS.items()
    }
    runs = {name: [Outcome((end,), 1.0)] for name, end in ends.items()}
    told = survey_report.against_readme(Survey(range(1), METHODS, runs, [1.0]))
    assert told == "All accuracies are within README's ranges."
    runs["dpo"] = [Outcome((dataclasses.replace(ends["dpo"], greedy=0.9),), 1.0)]
    told = survey_report.against_readme(Survey(range(1), METHODS, runs, [1.0]))
    *_, line = told.splitlines()
    assert line == "  DPO, pairs: greedy 0.900 (.959-.990)!, sampled 0.922 (.922-.949)"
    assert told.count("!") == 1


def test_on_a_terminal_the_table_fills_in():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    end = Measurement(samples=5120, greedy=0.986, sampled=0.77, kl=0.2)
    with Filling(console, METHODS) as filling:
        filling.seed(3)
        filling.begin("pg")
        filling.on_step(7, {"reward": 0.5})
        seen = Console(file=io.StringIO(), width=80)
        seen.print(filling._render())
        assert "step 7, reward 0.500" in seen.file.getvalue()
        assert filling.given == {"callbacks": filling}
        assert Display(None, 9, "PG", ("reward",))._console.quiet
        filling.end("pg", end)
        filling.begin("trpo")
        seen = Console(file=io.StringIO(), width=80)
        seen.print(filling._render())
    lines = [line.rstrip() for line in seen.file.getvalue().splitlines()]
    assert all(len(line) <= 80 for line in lines)
    assert lines[0] == "seed 3, 2 of 8: TRPO on the verifier"
    (pg,) = [line for line in lines if line.startswith("PG ")]
    assert pg.split() == ["PG", "verifier", "0.986", "(.973-.990)", "0.770", "(.904-.947)!", "0.20"]
    (trpo,) = [line for line in lines if line.startswith("TRPO")]
    assert "training" in trpo
    assert not Display(None, 9, "PG", ("reward",))._console.quiet


def test_in_a_file_a_method_is_a_line():
    console = Console(file=io.StringIO(), width=80)
    end = Measurement(samples=5120, greedy=0.986, sampled=0.77, kl=0.2)
    with Filling(console, METHODS) as filling:
        filling.seed(0)
        filling.begin("pg")
        filling.end("pg", end)
        assert filling.given == {}
        assert not Display(None, 9, "PG", ("reward",))._console.quiet
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("seed 0, problems") and lines[1].startswith("seed 0, 1 of 8: PG")
    assert lines[2].startswith("1 of 8: PG on the verifier: greedy 0.986 (.973-.990), ")
    assert "\x1b" not in console.file.getvalue()


def test_a_run_on_a_terminal_is_seen_in_the_table_alone(short, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(survey, "METHODS", {"pg": METHODS["pg"]})
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    run_survey(tmp_path / "all", range(7, 8), console=console)
    said = console.file.getvalue()
    assert "1 of 1: PG on the verifier" in said and "README's ranges" in said
    assert "PG " not in capfd.readouterr().err


def test_the_pairs_of_dpo_took_as_many_samples(tmp_path):
    start = survey.Start(
        arithmetic.task_paths(tmp_path), tmp_path, arithmetic.pair_paths(tmp_path), tmp_path
    )
    config = METHODS["dpo"].recipe(start, tmp_path / "dpo", 0)
    assert isinstance(config, DPOConfig) and config.dataset == str(start.pairs.train)
    defaults = arithmetic.make_pairs.__kwdefaults__
    assert defaults["prompts"] * defaults["num_generations"] == SAMPLES


def test_of_several_seeds_the_table_has_median_and_range():
    def outcome(greedy):
        before, after = Measurement(0, 0.5, 0.4, 0.0), Measurement(SAMPLES, greedy, 0.8, 0.25)
        return Outcome((before, after), 10.0)

    console = screen()
    runs = {name: [outcome(0.9), outcome(0.7), outcome(0.8)] for name in METHODS}
    show(console, Survey(range(3), METHODS, runs, [0.97, 0.98, 0.99]))
    shown = console.file.getvalue()
    assert "Seed(s) 0, 1, 2: medians (and ranges)" in shown
    assert "0.800 (.700-.900)" in shown and "0.980 (.970-.990)" in shown


def test_seeds_and_a_directory_of_something_else_are_checked_first(tmp_path):
    with pytest.raises(UserError, match="seeds must be at least 1, not 0"):
        demo(DemoConfig(output_dir=str(tmp_path), all=True, seeds=0))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no demo"):
        demo(DemoConfig(output_dir=str(tmp_path), all=True))
