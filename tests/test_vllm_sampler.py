"""Sampling from servers: what they are asked and given, and what happens when they fail."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.ranks import launch_two
from helpers.runs import grpo_config
from helpers.tiny import PROMPTS, save_tiny, tiny_model, tiny_tokenizer
from helpers.vllm_server import FakeVLLM

from rlcore.errors import UserError
from rlcore.models.loading import load_policy
from rlcore.sampling import server as http_server
from rlcore.sampling.sampler import LocalSampler, SamplingOptions
from rlcore.sampling.served_weights import write_served
from rlcore.sampling.vllm import VLLMSampler
from rlcore.trainers.distill import DistillConfig, train_distill
from rlcore.trainers.dpo import DPOConfig, train_dpo
from rlcore.trainers.grpo import GRPOConfig, train_grpo
from rlcore.trainers.options.sampling import SamplingConfig
from rlcore.trainers.pg import PGConfig, train_pg
from rlcore.trainers.ppo import PPOConfig, train_ppo
from rlcore.trainers.trpo import TRPOConfig, train_trpo


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "FIRST_WAIT", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeVLLM]:
    served = FakeVLLM(save_tiny(tmp_path / "served", initializer_range=0.05))
    yield served
    served.close()


def sampler_of(server: FakeVLLM, model=None, **options) -> VLLMSampler:
    model = model or tiny_model(seed=1, initializer_range=0.05)
    return VLLMSampler([server.url], model, tiny_tokenizer(), timeout=5.0, **options)


def config_of(directory: Path, server: FakeVLLM, **changes):
    options = {"sampler": "vllm", "sampler_url": [server.url], "sampler_timeout": 5.0}
    return grpo_config(directory, **options | changes)


def lengths(prompts: list, completions: list, **_) -> list[float]:
    return [float(len(text)) for text in completions]


def trained(config):
    return train_grpo(config, reward_funcs=[lengths])


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").open()]


def test_greedy_completions_are_those_of_the_local_sampler(server):
    model = tiny_model(seed=1)
    model.generation_config.eos_token_id = list(range(5, 15))
    options = SamplingOptions(max_new_tokens=6, greedy=True, num_generations=2)
    sampler = sampler_of(server, model)
    sampler.sync(model, 3)
    there = sampler.sample(PROMPTS, options)
    here = LocalSampler(model, tiny_tokenizer()).sample(PROMPTS, options)
    for field in dataclasses.fields(here):
        mine, theirs = getattr(here, field.name), getattr(there, field.name)
        if field.name == "sampling_logp":
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        else:
            assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs
    sampler.close()


def test_a_request_says_everything_and_speaks_of_tokens(server):
    options = SamplingOptions(
        num_generations=3, max_new_tokens=2, temperature=0.7, top_p=0.9, top_k=5
    )
    sampler = sampler_of(server)
    sampler.sync(sampler.policy, 0)
    rollout = sampler.sample(["7", "7"], options, seed=4)
    assert len(rollout.completions) == 6
    first, second = sorted(server.bodies, key=lambda body: body["sampling_params"]["seed"])
    assert first["token_ids"] == tiny_tokenizer()("7")["input_ids"]
    assert first["sampling_params"]["seed"] != second["sampling_params"]["seed"]
    asked = first["sampling_params"]
    assert (asked["n"], asked["temperature"], asked["top_p"], asked["top_k"]) == (3, 0.7, 0.9, 5)
    assert asked["stop_token_ids"] == [tiny_tokenizer().eos_token_id]
    again = sampler.sample(["7", "7"], options, seed=4)
    assert torch.equal(rollout.completion_ids, again.completion_ids)
    sampler.close()


def test_a_run_trains_on_what_its_policy_sampled_there(tmp_path, server):
    trained(config_of(tmp_path, server))
    metrics = lines(tmp_path / "run")
    assert len(metrics) == 4
    assert all(line["sampling/logp_difference/max"] < 1e-5 for line in metrics)
    # two generation batches, each after its own weights, which are gone now
    assert len(set(server.loaded)) == len(server.loaded) == 2
    assert not any(path.exists() for path in server.loaded)


def test_a_server_that_keeps_its_old_weights_ends_the_run(tmp_path, server):
    server.deaf = True
    with pytest.raises(UserError, match="log-probabilities of sampler and trainer differ by"):
        trained(config_of(tmp_path, server, sampler_tolerance=0.01, learning_rate=0.1))


def test_a_server_that_was_started_again_gets_the_weights_again(server):
    sampler = sampler_of(server)
    sampler.sync(sampler.policy, 0)
    options = SamplingOptions(max_new_tokens=4)
    before = sampler.sample(PROMPTS, options, seed=2)
    server.forget()
    after = sampler.sample(PROMPTS, options, seed=2)
    assert torch.equal(before.input_ids, after.input_ids)
    assert sampler.resampled > 0
    assert len(server.loaded) == 2
    sampler.close()


def test_cut_connections_and_busy_servers_are_asked_again(server):
    sampler = sampler_of(server)
    sampler.sync(sampler.policy, 0)
    options = SamplingOptions(max_new_tokens=4)
    before = sampler.sample(PROMPTS, options, seed=2)
    server.faults += [0, 503, 500, 429]
    after = sampler.sample(PROMPTS, options, seed=2)
    assert not server.faults
    assert torch.equal(before.input_ids, after.input_ids)
    sampler.close()


def test_a_server_that_is_gone_ends_the_run_with_its_checkpoint_intact(tmp_path, server):
    def closing(prompts, completions, **_):
        if len(server.loaded) == 2:
            server.faults += [0] * 10_000
        return lengths(prompts, completions)

    config = config_of(tmp_path, server, max_steps=8, save_steps=2, sampler_timeout=3)
    with pytest.raises(UserError) as raised:
        train_grpo(config, reward_funcs=[closing])
    message = str(raised.value)
    assert server.url in message and "checkpoint-4 is intact" in message
    server.faults.clear()
    result = trained(dataclasses.replace(config, resume=True))
    assert result.steps == 8


def test_two_runs_on_one_server_are_told_apart(server):
    mine, other = sampler_of(server), sampler_of(server)
    mine.sync(mine.policy, 0)

    answer = server.generate

    def taken(body):
        server.version = other.version
        return answer(body)

    server.generate = taken
    with pytest.raises(UserError, match="other weights than this run's, 3 times"):
        mine.sample(["7"], SamplingOptions(max_new_tokens=2))
    mine.close()


def test_prompts_are_spread_over_the_servers(tmp_path, server):
    second = FakeVLLM(server.first)
    model = tiny_model(seed=1, initializer_range=0.05)
    sampler = VLLMSampler([server.url, second.url + "/"], model, tiny_tokenizer(), timeout=5.0)
    sampler.sync(model, 0)
    sampler.sample(PROMPTS, SamplingOptions(max_new_tokens=2))
    assert len(server.bodies) == len(second.bodies) == 2
    sampler.close()
    second.close()


def test_a_server_of_another_vocabulary_is_refused_before_anything_is_written(tmp_path, server):
    server.model.config.vocab_size -= 1
    with pytest.raises(UserError, match="does not know the policy's token"):
        trained(config_of(tmp_path, server))
    assert not (tmp_path / "run").exists()


def test_a_server_of_another_model_is_refused(tmp_path, server):
    server.model.config.hidden_size += 1
    with pytest.raises(UserError, match="could not load the policy's weights"):
        trained(config_of(tmp_path, server))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampler": "vlm"}, "Did you mean 'vllm'"),
        ({"sampler": "vllm"}, "give --sampler-url"),
        ({"sampler": "vllm", "sampler_url": ["localhost:8000"]}, "is no http://HOST:PORT"),
        ({"sampler_timeout": 3.0}, "add --sampler vllm"),
        ({"sampler_url": ["http://localhost:1"]}, "add --sampler vllm"),
        ({"importance_sampling_correction": "tokens"}, "Did you mean"),
        ({"importance_sampling_clip_max": 2.0}, "nothing is corrected"),
        (
            {"importance_sampling_correction": "token_mask", "importance_sampling_clip_min": 4.0},
            "must not be above",
        ),
    ],
)
def test_options_of_the_sampler_are_checked(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        trained(grpo_config(tmp_path, **changes))


def test_a_tied_head_is_written_by_its_own_name(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    write_served(model, None, tmp_path)
    served = load_policy(str(tmp_path))
    assert served.get_output_embeddings().weight is not served.get_input_embeddings().weight
    ids = torch.arange(5)[None]
    assert torch.equal(served(ids).logits, model(ids).logits)


def test_an_adapter_is_merged_into_what_the_server_loads(tmp_path, server):
    config = config_of(tmp_path, server, peft="lora", lora_r=4)
    trained(config)
    assert all(line["sampling/logp_difference/max"] < 1e-4 for line in lines(tmp_path / "run"))


@pytest.mark.parametrize(
    "train, config_class",
    [
        (train_pg, PGConfig),
        (train_ppo, PPOConfig),
        (train_trpo, TRPOConfig),
        (train_dpo, DPOConfig),
        (train_distill, DistillConfig),
    ],
)
def test_every_trainer_that_samples_takes_it(tmp_path, server, train, config_class):
    grpo = config_of(tmp_path, server, max_steps=2)
    shared = {field.name: getattr(grpo, field.name) for field in dataclasses.fields(SamplingConfig)}
    del shared["learning_rate"]  # TRPO has none
    own = {
        DPOConfig: {"online": True},
        DistillConfig: {"teacher": str(tmp_path / "served"), "lmbda": 1.0},
    }
    train(config_class(**shared, **own.get(config_class, {})), reward_funcs=[lengths])
    assert lines(tmp_path / "run")[-1]["sampling/logp_difference/max"] < 1e-5


WEIGHT = 1.6


def corrected(directory, server, train, config_class, correction, **changes):
    """A step on completions that the server says it drew with too small a probability."""
    server.offset = -math.log(WEIGHT)
    grpo = config_of(directory, server, max_steps=1, sampler_tolerance=9.0)
    shared = {field.name: getattr(grpo, field.name) for field in dataclasses.fields(SamplingConfig)}
    del shared["learning_rate"]
    options = {"importance_sampling_correction": correction, "overwrite_output_dir": True}
    train(config_class(**shared | options | changes), reward_funcs=[lengths])
    return lines(directory / "run")[-1]


@pytest.mark.parametrize(
    "train, config_class, changes",
    [
        (train_grpo, GRPOConfig, {}),
        (train_pg, PGConfig, {}),
        (train_ppo, PPOConfig, {"num_ppo_epochs": 1}),
        (train_trpo, TRPOConfig, {}),
    ],
)
def test_importance_weights_weigh_every_policy_gradient(
    tmp_path, server, train, config_class, changes
):
    plain = corrected(tmp_path, server, train, config_class, "none", **changes)
    weighed = corrected(tmp_path, server, train, config_class, None, **changes)
    assert plain["grad_norm"] > 0
    assert weighed["grad_norm"] == pytest.approx(WEIGHT * plain["grad_norm"], rel=1e-4)


def test_the_importance_weights_are_measured(tmp_path, server):
    metrics = corrected(
        tmp_path, server, train_grpo, GRPOConfig, "token_mask", importance_sampling_clip_max=1.5
    )
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(math.log(WEIGHT), abs=1e-5)
    for name in ("mean", "min", "max"):
        assert metrics[f"sampling/importance_ratio/{name}"] == pytest.approx(WEIGHT, rel=1e-5)
    # all of it is out of bounds, and nothing is left
    assert metrics["sampling/importance_ratio/bounded"] == 1
    assert metrics["sampling/effective_sample_size"] == metrics["grad_norm"] == 0


def test_a_sampler_that_keeps_disagreeing_is_warned_of(tmp_path, server, capsys):
    corrected(tmp_path, server, train_grpo, GRPOConfig, None, max_steps=2)
    assert "sampler and trainer disagree" not in capsys.readouterr().err
    corrected(tmp_path, server, train_grpo, GRPOConfig, None, max_steps=3)
    said = capsys.readouterr().err
    assert "sampler and trainer disagree: their log-probabilities differ by 0." in said
    assert "sample with top_p 1" in said, "what to do follows"


def test_a_sequence_has_the_product_of_its_tokens_ratios(tmp_path, server):
    metrics = corrected(tmp_path, server, train_grpo, GRPOConfig, "sequence_truncate")
    # of completions of four tokens at most, none of which is empty
    assert metrics["sampling/importance_ratio/max"] == pytest.approx(WEIGHT**4, rel=1e-4)
    assert 0 < metrics["sampling/importance_ratio/bounded"] <= 1
    assert 0 < metrics["sampling/effective_sample_size"] <= 1


def test_what_this_process_samples_can_be_corrected_too(tmp_path):
    options = {"importance_sampling_correction": "token_truncate", "top_k": 5}
    trained(grpo_config(tmp_path, max_steps=1, **options))
    metrics = lines(tmp_path / "run")[-1]
    # five of many tokens hold a small part of the mass
    assert metrics["sampling/importance_ratio/max"] < 0.5
    assert metrics["sampling/effective_sample_size"] <= 1


def test_two_processes_sample_from_what_the_main_one_has_brought(tmp_path, server):
    grpo_config(tmp_path)  # writes the model, once
    launch_two("two_samplers.py", tmp_path, server.url)
    assert len(server.loaded) == 2
    assert all(line["sampling/logp_difference/max"] < 1e-5 for line in lines(tmp_path / "run"))
    assert all(line["sampling/resampled"] == 0 for line in lines(tmp_path / "run"))
