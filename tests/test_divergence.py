"""A run that has become NaN or infinite stops, says where, and saves nothing of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import actor_critic as make
from helpers import grpo
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

import rlcore as rl
from rlcore.cli import DIVERGED_STATUS, USAGE_STATUS, main
from rlcore.errors import TrainingDiverged, UserError
from rlcore.functional.finite import first_not_finite
from rlcore.models.loading import load_classifier, load_policy
from rlcore.sampling.rewards import LARGEST_REWARD, compute_rewards, load_reward
from rlcore.sampling.rollout import generate
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.sft import SFTConfig, train_sft
from rlcore.trainers.shared import divergence
from rlcore.trainers.shared.critic import _head_step
from rlcore.trainers.shared.divergence import check_sound, stop_together

# Spies wrap this one, not each other.
ADAMW_STEP = torch.optim.AdamW.step
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """(model, rows of demonstrations)."""
    home = tmp_path_factory.mktemp("divergence")
    rows = [json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) for n in range(8)]
    (home / "rows.jsonl").write_text("\n".join(rows))
    return save_tiny(home / "model", initializer_range=0.05), str(home / "rows.jsonl")


def sft_config(paths, tmp_path, **changes) -> SFTConfig:
    model, dataset = paths
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return SFTConfig(
        model=model, dataset=dataset, output_dir=str(tmp_path / "run"), **(options | changes)
    )


def poisoned(monkeypatch, at: int, poison) -> None:
    """Have `poison(parameters, state)` meet the weights after optimizer step `at`."""
    taken = []

    def step(self, *arguments, **options):
        ADAMW_STEP(self, *arguments, **options)
        taken.append(None)
        if len(taken) == at:
            parameters = [p for group in self.param_groups for p in group["params"]]
            with torch.no_grad():
                poison(parameters, self.state)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def one_nan(parameters, state):
    parameters[0].view(-1)[3] = NAN


def one_infinite_moment(parameters, state):
    state[parameters[0]]["exp_avg_sq"].view(-1)[3] = INF


def huge(parameters, state):
    for parameter in parameters:
        parameter *= 1e18


POISONS = {
    "a weight": (one_nan, r"weight .*embed_tokens.* is nan"),
    "the optimizer": (one_infinite_moment, "the optimizer's exp_avg_sq is inf"),
    "too large for the model": (huge, "a logit is nan"),
}


@pytest.mark.parametrize(("poison", "found"), POISONS.values(), ids=POISONS)
def test_what_the_last_step_broke_is_not_saved_as_a_model(
    paths, tmp_path, monkeypatch, poison, found
):
    poisoned(monkeypatch, 2, poison)
    with pytest.raises(TrainingDiverged, match=f"step 2: {found}"):
        train_sft(sft_config(paths, tmp_path, max_steps=2, save_steps=0))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"config.json", "model.safetensors"}


def test_a_checkpoint_is_checked_before_it_is_written_and_an_older_one_dropped(
    paths, tmp_path, monkeypatch
):
    poisoned(monkeypatch, 3, one_nan)
    with pytest.raises(TrainingDiverged) as caught:
        train_sft(sft_config(paths, tmp_path, save_steps=1, save_total_limit=1))
    assert (caught.value.step, caught.value.last_checkpoint.name) == (3, "checkpoint-2")
    weights = load_policy(str(caught.value.last_checkpoint)).state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-2"]


def test_an_absurd_learning_rate_ends_the_command_with_an_error(paths, tmp_path, capsys):
    model, dataset = paths
    flags = ["--model", model, "--dataset", dataset, "--output-dir", str(tmp_path / "run")]
    flags += ["--max-steps", "1", "--learning-rate", "1e38"]
    assert main(["train", "sft", *flags]) == DIVERGED_STATUS
    assert "error: step 1: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(("logit", "is_sound"), [(NAN, False), (INF, False), (-INF, True)])
def test_a_logit_may_ban_its_token_and_do_nothing_else_that_is_not_finite(
    tmp_path, monkeypatch, logit, is_sound
):
    run = grpo.make_run(grpo.config(tmp_path))
    monkeypatch.setattr(divergence, "_probe_logits", lambda _: torch.tensor([0.0, logit]))
    with contextlib.nullcontext() if is_sound else pytest.raises(TrainingDiverged, match="a logit"):
        check_sound(run, 1)


def test_the_check_draws_no_random_numbers_and_leaves_the_model_training(tmp_path):
    run = grpo.make_run(grpo.config(tmp_path))
    run.model.train()
    before = torch.get_rng_state()
    check_sound(run, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in run.model.modules())


def test_what_one_process_finds_stops_the_others_too(tmp_path):
    run = grpo.make_run(grpo.config(tmp_path))
    stop_together(run, 5, None)
    # of two processes, the other one has found something
    pair = SimpleNamespace(device=torch.device("cpu"), reduce=lambda value, how: value + 1)
    with pytest.raises(TrainingDiverged, match="step 5: a quantity of another process is nan"):
        stop_together(dataclasses.replace(run, accelerator=pair), 5, None)


def test_a_shared_value_heads_gradient_is_looked_at(tmp_path):
    _, critic = make.make_run(make.ppo_config(tmp_path, value_backbone="shared"))
    head = critic.run.model
    before = [parameter.detach().clone() for parameter in head.parameters()]
    with pytest.raises(TrainingDiverged, match="step 2: value/grad_norm is inf"):  # noqa: SIM117
        with _head_step(critic, 2):
            for parameter in head.parameters():
                parameter.grad = torch.full_like(parameter, INF)
    assert all(map(torch.equal, head.parameters(), before))


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("value", [NAN, INF])
def test_no_token_is_sampled_from_what_is_no_number(greedy, value):
    """One logit of one row, at the second token, is enough."""
    model, count = tiny_model("gpt2"), []

    def spoil(module, inputs, outputs):
        count.append(None)
        if len(count) == 2:
            outputs.logits[0, -1, 5] = value

    model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        generate(model, tiny_tokenizer(), ["7", "8 + 1"], max_new_tokens=4, greedy=greedy)
    assert len(count) == 4, "every process makes its forward passes"


def test_a_temperature_too_low_for_the_logits_is_no_traceback_of_multinomial():
    with pytest.raises(FloatingPointError):
        generate(tiny_model("gpt2"), tiny_tokenizer(), ["7"], max_new_tokens=2, temperature=1e-40)
    with pytest.raises(ValueError, match="temperature must be positive"):
        generate(tiny_model("gpt2"), tiny_tokenizer(), ["7"], max_new_tokens=2, temperature=INF)


def grpo_config(paths, tmp_path, **changes) -> GRPOConfig:
    options = {
        "max_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 3,
        "learning_rate": 1e-3,
    }
    model, dataset = paths
    return GRPOConfig(
        model=model, dataset=dataset, output_dir=str(tmp_path / "run"), **(options | changes)
    )


def lengths(prompts, completions, **_):
    return [float(len(text)) for text in completions]


def test_a_policy_that_broke_is_found_when_it_samples_next(paths, tmp_path, monkeypatch):
    poisoned(monkeypatch, 1, lambda parameters, state: parameters[0].fill_(NAN))
    config = grpo_config(paths, tmp_path, save_steps=0)
    with pytest.raises(TrainingDiverged, match="step 2: a logit over temperature, in sampling"):
        train_grpo(config, reward_funcs=[lengths])


def broken_model(paths, tmp_path) -> str:
    model = load_policy(paths[0])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = NAN
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    return str(tmp_path / "broken")


def test_a_model_with_nan_weights_is_refused_by_the_weights_name(paths, tmp_path):
    broken = broken_model(paths, tmp_path)
    message = r"broken.*weight model\.layers\.1\.mlp\.up_proj\.weight has a nan"
    with pytest.raises(UserError, match=message):
        train_sft(dataclasses.replace(sft_config(paths, tmp_path), model=broken))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=message):
        load_classifier(broken, new_head="zero")


def test_a_fused_head_is_not_blamed_for_nan_weights():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = NAN
    with pytest.raises(UserError, match="LlamaForCausalLM gives logits that are NaN"):
        rl.fused_head(model)


@pytest.mark.parametrize("reward", [1e39, -1e300, 1e19, INF])
def test_a_reward_that_float32_cannot_square_is_refused(reward):
    with pytest.raises(UserError, match=r"returned .* for completion 1: a reward is"):
        compute_rewards([lambda **_: [0.0, reward]], None, ["a", "b"], ["c", "d"], {})


def test_weights_make_no_reward_too_large_either():
    def give(weight, reward=3.0):
        weights = [weight, 1.0]
        return compute_rewards(
            [lambda **_: [reward], lambda **_: [None]], weights, ["a"], ["b"], {}
        )

    assert give(1e17).total.item() == pytest.approx(3e17)
    assert give(0.5, LARGEST_REWARD).total.item() == pytest.approx(5e17)
    for weight in (1e18, -1e30, 3e38):
        with pytest.raises(UserError, match="reward_weights"):
            give(weight)


def exits(prompts, completions, **_):
    raise SystemExit(0)


def test_a_reward_that_exits_does_not_end_the_command_with_success(
    paths, tmp_path, capsys, monkeypatch
):
    model, dataset = paths
    flags = ["--model", model, "--dataset", dataset, "--output-dir", str(tmp_path / "run")]
    flags += ["--per-device-train-batch-size", "8", "--max-completion-length", "2"]
    assert main(["train", "grpo", *flags, "--reward", f"{__name__}:exits"]) == USAGE_STATUS
    assert "reward function 'exits' raised SystemExit: 0" in capsys.readouterr().err
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot import 'leaves': SystemExit: 0"):
        load_reward("leaves:function")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_tensor_with_a_nan_or_an_infinity_is_named(dtype):
    good = torch.linspace(-3, 3, 11, dtype=dtype)
    for value in (NAN, INF, -INF):
        bad = good.clone()
        bad[7] = value
        tensors = [("empty", good[:0]), ("whole", torch.arange(3)), ("good", good), ("bad", bad)]
        name, found = first_not_finite(iter(tensors))
        assert name == "bad" and (found == value or math.isnan(found) == math.isnan(value))
    largest = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    assert first_not_finite([("good", good), ("largest", largest), ("lowest", -largest)]) is None
