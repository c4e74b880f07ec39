"""Whole GRPO runs on tiny models: that they learn, repeat, resume, stop, and share the work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import grpo as make
from helpers.ranks import launch_two
from helpers.tiny import most_of, save_tiny, tiny_tokenizer
from helpers.two_processes import VARIANTS
from transformers import AutoModelForCausalLM

from rlcore.errors import TrainingDiverged, UserError
from rlcore.functional.advantages import group_advantage
from rlcore.runs.checkpoint import last_checkpoint
from rlcore.runs.tracking import read_metrics
from rlcore.trainers import grpo
from rlcore.trainers.grpo import GRPOConfig, train_grpo, update_policy
from rlcore.trainers.options.grpo import LOSS_TYPES


def digits(prompts, completions, **_):
    """The share of digits among a completion's characters."""
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


@pytest.fixture
def config(tmp_path):
    lines = [json.dumps({"prompt": f"{n}+1", "answer": str(n + 1)}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return GRPOConfig(
        model=save_tiny(tmp_path / "model", initializer_range=0.05),
        dataset=str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        save_steps=0,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=4,
        max_steps=4,
    )


def run(config, **changes):
    return train_grpo(
        dataclasses.replace(config, overwrite_output_dir=True, **changes), reward_funcs=[digits]
    )


def lines(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def weights(path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(one, two) -> bool:
    one, two = weights(one), weights(two)
    return all(torch.equal(value, two[name]) for name, value in one.items())


def gain(config, steps: int = 15) -> float:
    """How much the reward rose in so many optimizer steps."""
    run(config, max_steps=steps, learning_rate=3e-2, lr_scheduler_type="constant")
    rewards = [line["reward"] for line in lines(config)]
    return sum(rewards[-3:]) / 3 - rewards[0]


# of 1; this much comes in about nine steps
LEARNED = 0.6


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma2"])
def test_it_runs_on_each_architecture(config, tmp_path, kind):
    model = save_tiny(tmp_path / kind, kind, initializer_range=0.05)
    run(config, model=model, max_steps=1, beta=0.1)
    (line,) = lines(config)
    assert abs(line["kl"]) < 1e-4 and line["grad_norm"] > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_it_learns_what_is_rewarded(config, loss_type):
    needed = make.NEEDED.get(loss_type, {})
    assert gain(dataclasses.replace(config, loss_type=loss_type, **needed)) > LEARNED


def test_with_the_advantages_sign_flipped_it_would_not(config, monkeypatch):
    monkeypatch.setattr(
        grpo, "group_advantage", lambda *args, **kwargs: -group_advantage(*args, **kwargs)
    )
    assert gain(config) < 0.05


def test_with_the_advantages_shuffled_it_would_not(config, monkeypatch):
    monkeypatch.setattr(
        grpo,
        "group_advantage",
        lambda *args, **kwargs: group_advantage(*args, **kwargs).roll(13),
    )
    assert gain(config) < LEARNED / 2


def test_off_policy_runs_learn_too(config):
    several = dataclasses.replace(
        config, num_iterations=2, steps_per_generation=2, per_device_train_batch_size=16
    )
    # four optimizer steps a generation batch, so eight batches
    assert gain(dataclasses.replace(several, beta=0.01), steps=32) > LEARNED / 2
    assert any(line["clip_ratio/region_mean"] > 0 for line in lines(several))


def test_the_metrics_carry_trls_names_and_a_held_out_line_comes_first(config):
    result = run(config, eval_dataset=most_of(config.dataset), eval_steps=2, beta=0.1)
    written = lines(config)
    assert [line["step"] for line in written] == [0, 1, 2, 2, 3, 4, 4]
    held_out = {"eval/reward", "eval/completions/mean_length", "eval/rewards/digits/mean"}
    assert set(written[0]) == held_out | {"step"}
    assert set(written[1]) == {
        "step", "epoch", "loss", "grad_norm", "learning_rate", "reward", "reward_std",
        "frac_reward_zero_std", "rewards/digits/mean", "rewards/digits/std", "kl", "kl/bounded",
        "entropy",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
        "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/clipped_ratio", "completions/unjudged", "num_tokens", "tokens_per_second",
        "step_time",
    }  # fmt: skip
    assert all(set(written[place]) == held_out | {"step"} for place in (0, 3, 6))
    assert result.metrics == written[-2] | written[-1]
    assert written[-2]["epoch"] == 2.0  # 4 steps of 4 prompts, 8 rows
    prompts = 4 * 4 * 8 * len(tiny_tokenizer()("1+1")["input_ids"])
    trained = [line for line in written if "completions/mean_length" in line]
    completions = sum(32 * line["completions/mean_length"] for line in trained)
    assert trained[-1]["num_tokens"] == pytest.approx(prompts + completions)


def test_the_kl_to_the_reference_starts_at_zero_and_grows(config, tmp_path):
    run(config, beta=0.1)
    kl = [line["kl"] for line in lines(config)]
    assert abs(kl[0]) < 1e-6 < kl[-1]
    run(config, beta=0.1, ref_model=save_tiny(tmp_path / "other", seed=3, initializer_range=0.05))
    assert lines(config)[0]["kl"] > 1e-3


def test_a_large_beta_holds_the_policy_at_its_reference(config):
    moved = {}
    for beta in (0.0, 100.0):
        moved[beta] = gain(dataclasses.replace(config, beta=beta))
    assert moved[100.0] < moved[0.0] / 2


def test_the_seed_decides_the_run(config, tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run(config, output_dir=str(tmp_path / name), seed=seed)
    assert same(tmp_path / "one", tmp_path / "same")
    assert not same(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}], ids=["on-policy", "off-policy"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path, options):
    config = dataclasses.replace(
        config, lr_scheduler_type="constant", save_steps=2, beta=0.05, **options
    )
    run(config, max_steps=4)
    halves = dataclasses.replace(config, output_dir=str(tmp_path / "halves"))
    run(halves, max_steps=2)
    resumed = dataclasses.replace(halves, resume=True, max_steps=4)
    train_grpo(resumed, reward_funcs=[digits])
    assert same(config.output_dir, halves.output_dir)
    for name in ("step", "loss", "reward", "kl", "num_tokens", "epoch"):
        assert [line[name] for line in lines(config)] == [line[name] for line in lines(halves)]


def test_a_reward_that_raises_leaves_the_checkpoint_to_go_on_from(config, tmp_path):
    calls = []

    def breaks(prompts, completions, answer, **_):
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("in the third batch")
        return digits(prompts, completions)

    config = dataclasses.replace(config, lr_scheduler_type="constant", save_steps=2)
    run(config, max_steps=4)
    broken = dataclasses.replace(config, output_dir=str(tmp_path / "broken"))
    with pytest.raises(UserError, match=r"KeyError: 'in the third batch' at .*test_grpo_run.py:"):
        train_grpo(broken, reward_funcs=[breaks])
    assert last_checkpoint(broken.output_dir).name == "checkpoint-2"
    train_grpo(dataclasses.replace(broken, resume=True), reward_funcs=[digits])
    assert same(config.output_dir, broken.output_dir)
    assert [line["step"] for line in lines(broken)] == [1, 2, 3, 4]


def test_checkpoints_wait_for_the_end_of_a_generation_batch(config):
    run(config, num_iterations=3, max_steps=9, save_steps=4)
    saved = sorted(path.name for path in Path(config.output_dir).glob("checkpoint-*"))
    assert saved == ["checkpoint-6", "checkpoint-9"]


def test_truncated_completions_can_be_left_out_of_the_loss(config, monkeypatch):
    counted = []
    update = grpo.update_policy

    def spy(run, step, made, rows):
        lengths = made.attention_mask[:, -made.completion_length :].sum(1)
        ends = made.target.eq(tiny_tokenizer().eos_token_id).any(1)
        counted.append((ends, made.mask.sum(1), lengths))
        return update(run, step, made, rows)

    monkeypatch.setattr(grpo, "update_policy", spy)
    run(config, mask_truncated_completions=True, max_steps=2)
    for ends, tokens, lengths in counted:
        assert torch.equal(tokens, torch.where(ends, lengths, 0))
        assert not ends.all()


def test_columns_of_the_data_reach_the_reward_function(config):
    seen = []

    def spy(prompts, completions, answer, **_):
        seen.extend(zip(prompts, answer, strict=True))
        return [0.0] * len(completions)

    train_grpo(config, reward_funcs=[spy])
    assert len(seen) == 4 * 32
    assert all(int(prompt.partition("+")[0]) + 1 == int(answer) for prompt, answer in seen)
    groups = [seen[start : start + 8] for start in range(0, len(seen), 8)]
    assert all(len(set(group)) == 1 for group in groups)


def test_completions_without_any_opinion_are_counted_and_left_alone(config):
    def picky(prompts, completions, **_):
        return [None if n % 4 == 0 else float(len(text)) for n, text in enumerate(completions)]

    result = train_grpo(config, reward_funcs=[picky])
    assert result.metrics["completions/unjudged"] == 8
    assert result.metrics["reward"] > 0


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    config = dataclasses.replace(config, save_steps=1)
    update, loss = grpo.update_policy, grpo.surrogate_loss

    def explode(run, step, made, rows):
        if step == 3:
            monkeypatch.setattr(
                grpo,
                "surrogate_loss",
                lambda *args: (r := loss(*args))._replace(loss=r.loss * torch.nan),
            )
        return update(run, step, made, rows)

    monkeypatch.setattr(grpo, "update_policy", explode)
    with pytest.raises(TrainingDiverged, match=r"step 3: loss is nan.*checkpoint-2"):
        run(config)
    assert all(
        torch.isfinite(value).all()
        for value in weights(f"{config.output_dir}/checkpoint-2").values()
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_type": "grop"}, "unknown loss_type 'grop'. Did you mean 'grpo'"),
        ({"loss_type": "sapo", "delta": 2.0}, "loss_type 'sapo' does not use delta"),
        ({"loss_type": "cispo_abs"}, "loss_type 'cispo_abs' needs epsilon_high"),
        ({"loss_type": "sapo", "surrogate_params": {"tau": 2.0}}, "may hold .*'tau_pos'.* 'tau'"),
        ({"loss_type": "sapo", "surrogate_params": {"tau_pos": -1.0}}, "'sapo': tau_pos must be"),
        ({"surrogate_params": {"tau_pos": 1.0}}, "loss_type 'dapo': surrogate_params of 'ppo_cl"),
        (
            {"loss_type": "luspo", "importance_sampling_level": "token"},
            "loss_type 'luspo' has no importance ratio at token level",
        ),
        (
            {"loss_type": "dppo_kl", "importance_sampling_level": "sequence"},
            "loss_type 'dppo_kl' has no importance ratio at sequence level",
        ),
        ({"fipo_clip_range": 0.1}, "fipo_clip_range is set, but has no effect here"),
        ({"loss_type": "gmpo", "kl_estimator": "k3_ratio", "beta": 0.1}, "'gmpo' clips its token"),
        (
            {"importance_sampling_level": "sequnce"},
            "unknown importance_sampling_level 'sequnce'. Did you mean 'sequence'",
        ),
        ({"scale_rewards": "std"}, "unknown scale_rewards"),
        ({"multi_objective_aggregation": "sum"}, "unknown multi_objective_aggregation 'sum'"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "scale_rewards is set, but has no effect here",
        ),
        ({"kl_estimator": "k4"}, "unknown kl_estimator"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"num_generations": 5}, "32 completions at a time, which num_generations"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "must be a multiple of"),
        ({"steps_per_generation": 0}, "steps_per_generation must be at least 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"epsilon": -0.1}, "epsilon must be positive"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries for 1 rewards"),
        ({"ref_model": "x"}, "with beta 0 no reference is used"),
        ({"reward": ["no_such_reward"]}, "unknown reward 'no_such_reward'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(config, changes, message):
    with pytest.raises(UserError, match=message):
        run(config, **changes)
    assert not Path(config.output_dir).exists()


def test_a_run_without_a_reward_is_refused(config):
    with pytest.raises(UserError, match="no reward"):
        train_grpo(config)


def test_a_reward_function_that_fails_leaves_no_model_behind(config):
    def fails(prompts, completions, **_):
        raise KeyError("answer")

    with pytest.raises(UserError, match="'fails' raised KeyError"):
        train_grpo(config, reward_funcs=[fails])
    assert not (Path(config.output_dir) / "model.safetensors").exists()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two gloo processes wrote, each on half of the rows."""
    directory = tmp_path_factory.mktemp("ranks")
    return directory, launch_two("two_processes.py", directory, *LOSS_TYPES, *VARIANTS)


@pytest.mark.parametrize("loss_type", [*(t for t in LOSS_TYPES if t != "bnpo"), *VARIANTS])
def test_two_processes_take_the_step_of_one(two_ranks, tmp_path, loss_type):
    changes = VARIANTS.get(loss_type, {"loss_type": loss_type})
    run = make.make_run(make.config(tmp_path, beta=0.3, **changes))
    _, expected = update_policy(run, 1, make.experience(old=0.3, ref=0.4), torch.arange(8))
    gradient = make.gradient(run.policy)
    for rank in two_ranks[1]:
        taken = rank[loss_type]
        assert (taken["gradient"] - gradient).norm() < 1e-5 * gradient.norm()
        for name in ("loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean"):
            assert taken["metrics"][name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_bnpo_averages_what_each_process_found_for_itself(two_ranks, tmp_path):
    gradients = []
    for rows in (torch.arange(4), torch.arange(4, 8)):
        run = make.make_run(make.config(tmp_path, loss_type="bnpo", beta=0.3))
        update_policy(run, 1, make.experience(old=0.3, ref=0.4), rows)
        gradients.append(make.gradient(run.policy))
    mean = sum(gradients) / 2
    for rank in two_ranks[1]:
        assert (rank["bnpo"]["gradient"] - mean).norm() < 1e-5 * mean.norm()


def test_a_signal_to_one_of_two_processes_stops_both_and_they_go_on_exactly(two_ranks):
    directory, ranks = two_ranks
    for rank in ranks:
        for name, value in rank["weights"].items():
            assert torch.equal(value, rank["weights in two goes"][name])
    steps = [line["step"] for line in read_metrics(directory / "stopped" / "metrics.jsonl")]
    # the evaluation after the last step is a line of its own
    assert steps == [0, 1, 2, 3, 3]


def test_two_processes_end_a_run_with_the_same_weights_and_one_log(two_ranks):
    directory, (one, two) = two_ranks
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name])
    written = read_metrics(directory / "run" / "metrics.jsonl")
    assert [line["step"] for line in written] == [0, 1, 2, 3, 3]
    saved = weights(directory / "run")
    assert all(torch.equal(saved[name], value) for name, value in one["weights"].items())
    before = weights(directory / "model")
    assert any(not torch.equal(saved[name], value) for name, value in before.items())
    assert (directory / "run" / "checkpoint-2").is_dir()


def test_several_rewards_are_normalized_each_in_its_group(config, monkeypatch):
    """What is trained on is GDPO's advantage of the two rewards by weight."""
    seen = []

    def note(run, advantage):
        seen.append(advantage)

    def count(prompts, completions, **_):
        return [float(len(set(text))) for text in completions]

    def first(prompts, completions, **_):
        return [100.0 * (text < "m") for text in completions]

    given = []
    decoupled = grpo.decoupled_group_advantage

    def spy(reward, num_generations, *, weight):
        given.append((reward, num_generations, weight))
        return decoupled(reward, num_generations, weight=weight)

    monkeypatch.setattr(grpo, "note_advantages", note)
    monkeypatch.setattr(grpo, "decoupled_group_advantage", spy)
    changed = dataclasses.replace(
        config, max_steps=1, multi_objective_aggregation="normalize_then_sum",
        reward_weights=[1.0, 0.25],
    )  # fmt: skip
    train_grpo(changed, reward_funcs=[count, first])
    ((reward, size, weight),) = given
    assert reward.shape == (len(seen[0]), 2) and size == config.num_generations
    assert weight.tolist() == [1.0, 0.25]
    torch.testing.assert_close(seen[0], decoupled(reward, size, weight=weight))
    assert set(reward[:, 1].tolist()) <= {0.0, 100.0}
