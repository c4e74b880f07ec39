"""What a run shows besides numbers: samples, warnings, and the course of what was held out."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.tiny import save_tiny
from rich.console import Console

import rlcore.trainers
from rlcore.errors import UserError
from rlcore.runs.display import Display
from rlcore.runs.samples import Sample, append_samples, telling
from rlcore.runs.tracking import GRPO_COLUMNS, Tracker
from rlcore.runs.warnings import PATIENCE, RULES, Warnings
from rlcore.trainers.grpo import GRPOConfig, train_grpo


def sample(reward: float, row: int = 0, **more) -> Sample:
    given = {"prompt": "p", "completion": f"c{reward}", "rewards": {"f": reward}, **more}
    return Sample(row, reward=reward, truncated=False, **given)


def console(width: int = 80, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, record=True)


def kept(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "completions.jsonl").open(encoding="utf-8")]


def test_the_prompt_whose_rewards_differ_most_is_told_of_best_and_worst_first():
    rewards = [0.5, 0.5, 0.5, 0.2, 0.9, 0.4, math.nan, 0.1, 0.1]
    samples = [sample(r, i) for i, r in enumerate(rewards)]
    chosen = telling([samples[:3], samples[3:6], samples[6:]], count=4)
    assert [each.reward for each in chosen] == [0.9, 0.2, 0.4, 0.1]
    assert telling([[sample(0.5)]], count=3)[0].reward == 0.5


def test_a_line_is_strict_json_of_what_was_sampled(tmp_path):
    messages = [{"role": "user", "content": "héllo"}]
    append_samples(tmp_path, 7, "eval", [sample(math.nan, prompt=messages, advantage=math.inf)])
    (line,) = kept(tmp_path)
    assert line == {
        "step": 7, "split": "eval", "prompt": messages, "completion": "cnan",
        "rewards": {"f": None}, "reward": None, "truncated": False, "advantage": None,
    }  # fmt: skip


def test_a_resumed_run_drops_the_samples_that_it_will_draw_again(tmp_path):
    for step in (1, 2, 3):
        append_samples(tmp_path, step, "train", [sample(0.1)])
    with Tracker(tmp_path, 4, "run", start_step=2, console=console()) as tracker:
        tracker.samples(3, "train", [sample(0.9)])
    assert [(line["step"], line["reward"]) for line in kept(tmp_path)] == [
        (1, 0.1), (2, 0.1), (3, 0.9),
    ]  # fmt: skip


BEYOND = {
    "frac_reward_zero_std": (1.0, 0.5),
    "completions/clipped_ratio": (0.9, 0.1),
    "completions/unjudged": (2.0, 0.0),
    "entropy": (0.001, 0.5),
    "kl": (3.0, 0.01),
    "objective/kl": (80.0, 4.0),
    "kl/bounded": (0.1, 0.0),
    "clip_ratio/region_mean": (0.8, 0.1),
    "value/explained_variance": (-0.5, 0.6),
    "sampling/logp_difference/mean": (0.04, 0.001),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.metric)
def test_a_rule_warns_while_its_metric_is_beyond_its_bound(rule):
    beyond, within = BEYOND[rule.metric]
    warnings = Warnings()
    for _ in range(PATIENCE - 1):
        warnings.follow({rule.metric: beyond})
        warnings.follow({"another": 1.0})
    assert not warnings.active
    warnings.follow({rule.metric: beyond})
    assert list(warnings.active) == [rule.metric]
    assert ":" in warnings.active[rule.metric], "what to do follows"
    warnings.follow({rule.metric: within})
    assert not warnings.active


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.metric)
def test_a_rule_is_about_a_metric_that_a_trainer_logs(rule):
    trainers = Path(rlcore.trainers.__file__).parent
    sources = [path.read_text("utf-8") for path in trainers.rglob("*.py")]
    prefix, _, name = rule.metric.partition("/")
    spellings = (f'"{rule.metric}"', f"{rule.metric}=", f'f"{prefix}/{{name}}"')
    assert any(each in source for source in sources for each in spellings), name


def shown(width: int) -> list[str]:
    screen = console(width)
    display = Display(screen, 60, "GRPO", GRPO_COLUMNS, subtitle="runs/here  Qwen2 0.3M, 9 rows")
    display.show_phase("sampling")
    display.update(0, {"eval/reward": 0.5})
    for step in range(1, 5):
        values = {"reward": step / 10, "kl": 0.01, "entropy": 0.3, "tokens_per_second": 4100.0}
        display.update(step, values)
    display.update(4, {"eval/reward": 0.75}, {"kl": "the KL is high: raise beta"})
    display.show_samples(4, [sample(1.0, completion="long " * 40), sample(0.0)])
    screen.export_text(clear=True)  # the plain lines that led here
    screen.print(display._render())
    return screen.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 60])
def test_the_screen_shows_what_one_decides_by_first_and_fits(width):
    lines = shown(width)
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("GRPO  runs/here  Qwen2 0.3M") and "sampling" in lines[1]
    assert "held-out reward 0.750" in lines[2] and "start 0.500" in lines[2]
    assert "best 0.750 @4" in lines[2] and "reward 0.400" in lines[3]
    text = "\n".join(lines)
    assert "step 4, of one prompt: p" in text and " 1.000 long long" in text
    assert "! the KL is high: raise beta" in text


def test_samples_of_several_prompts_stand_behind_their_own():
    screen = console(60)
    display = Display(screen, 9, "SFT", ("loss",))
    display.show_samples(3, [sample(math.nan, prompt="word " * 20), sample(0.5)])
    screen.export_text(clear=True)
    screen.print(display._render())
    lines = screen.export_text().splitlines()
    assert lines[-3] == "step 3"
    assert "word → cnan" in lines[-2] and "nan" not in lines[-2].split("→")[0]
    assert lines[-1].strip() == "0.500 p → c0.5" and all(len(line) <= 60 for line in lines)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.5, 0.9, 0.8], "0.500 at the start, 0.800 at the end, best 0.900 at step 1"),
        ([0.5, 0.4], "nothing was learned by this measure"),
    ],
)
def test_the_end_says_what_came_of_it_and_repeats_what_still_warns(tmp_path, values, said):
    screen = console(terminal=False)
    with Tracker(tmp_path, 9, "GRPO", columns=("reward",), console=screen) as tracker:
        for step, value in enumerate(values):
            tracker.log(step, {"eval/reward": value})
        for step in range(PATIENCE):
            tracker.log(step, {"completions/clipped_ratio": 0.8})
    *_, warned, course = screen.file.getvalue().splitlines()
    assert warned.startswith("warning: 80% of the completions are cut off")
    assert said in course


def test_the_end_of_a_resumed_run_knows_where_it_began(tmp_path):
    screen = console(terminal=False)
    with Tracker(tmp_path, 9, "GRPO", columns=("reward",), console=screen) as tracker:
        tracker.log(0, {"eval/reward": 0.25})
        tracker.log(4, {"eval/reward": 0.75})
        tracker.log(6, {"eval/reward": 0.9})
    with Tracker(tmp_path, 9, "GRPO", columns=("reward",), console=screen, start_step=5) as tracker:
        tracker.log(9, {"eval/reward": 0.5})
    course = screen.file.getvalue().splitlines()[-1]
    assert "0.250 at the start, 0.500 at the end, best 0.750 at step 4" in course


def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("count", [0, 3])
def test_a_run_keeps_samples_of_training_and_of_what_is_held_out(tmp_path, count):
    rows = [json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:3]))
    (tmp_path / "held.jsonl").write_text(rows[3])
    config = GRPOConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(tmp_path / "rows.jsonl"),
        eval_dataset=str(tmp_path / "held.jsonl"),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        max_steps=2,
        log_completions=count,
    )
    train_grpo(config, reward_funcs=[length])
    if not count:
        assert not (tmp_path / "run" / "completions.jsonl").exists()
        return
    lines = kept(tmp_path / "run")
    assert [(each["step"], each["split"]) for each in lines] == [
        (0, "eval"), *[(1, "train")] * 3, *[(2, "train")] * 3, (2, "eval"),
    ]  # fmt: skip
    best, worst, _ = [each for each in lines if each["step"] == 1]
    assert best["prompt"] == worst["prompt"] and best["reward"] >= worst["reward"]
    assert best["reward"] == best["rewards"]["length"] == len(best["completion"])
    assert best["advantage"] >= worst["advantage"] and lines[0]["advantage"] is None
    assert not (tmp_path / "run" / "completions.parquet").exists()
    # another run may take the directory over, samples and all
    train_grpo(dataclasses.replace(config, overwrite_output_dir=True), reward_funcs=[length])
    assert len(kept(tmp_path / "run")) == len(lines)
    config = dataclasses.replace(config, overwrite_output_dir=True, completions_format="parquet")
    train_grpo(config, reward_funcs=[length])
    table = Dataset.from_parquet(str(tmp_path / "run" / "completions.parquet")).to_list()
    lines = kept(tmp_path / "run")
    assert [row | {"rewards": json.loads(row["rewards"])} for row in table] == lines
    with pytest.raises(UserError, match="unknown completions_format 'csv'"):
        train_grpo(dataclasses.replace(config, completions_format="csv"), reward_funcs=[length])
