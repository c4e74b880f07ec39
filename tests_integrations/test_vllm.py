"""A real vLLM server on this machine's CPU: `make test-vllm` makes its environment."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlcore.commands import serve
from rlcore.demo.arithmetic import make_tokenizer
from rlcore.demo.tiny_model import write_model
from rlcore.errors import UserError
from rlcore.models.forward import completion_logits
from rlcore.models.loading import load_policy, load_tokenizer
from rlcore.sampling import served_weights
from rlcore.sampling.choosing import truncated
from rlcore.sampling.sampler import LocalSampler, SamplingOptions
from rlcore.sampling.vllm import VLLMSampler
from rlcore.trainers.grpo import GRPOConfig, train_grpo

VLLM = Path(__file__).parents[1] / ".venv/vllm/bin/vllm"
PROMPTS = ["Ben has 9 pears, gets 8 more. How many pears?", "7", "Ana has 5 coins"]
ROWS = [{"prompt": f"{n}+1"} for n in range(12)]
# of a CPU: memory for the cache in GiB, and threads that are not pinned to cores
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

pytestmark = pytest.mark.skipif(not VLLM.exists(), reason="`make test-vllm` installs vLLM")


class Served:
    """`rlcore serve` on a free port, or plain `vllm serve` with `words`."""

    def __init__(self, model: Path, directory: Path, words: list[str] | None = None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"server-{self.port}.log"
        self.environment = os.environ | ENVIRONMENT | serve.ENVIRONMENT
        more = directory / "more.yaml"
        more.write_text("enforce-eager: true\n")
        self.words = words or [
            *(sys.executable, "-m", "rlcore", "serve", str(model), "--vllm", str(VLLM)),
            *("--max-model-len", "128", "--vllm-config", str(more)),
        ]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*self.words, "--port", str(self.port)],
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-2000:]
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-2000:])

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the server and what it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
            self.process.wait(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, make_tokenizer(), 0)  # its head is tied
    return directory


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(model, tmp_path_factory.mktemp("server"))
    yield served
    served.stop()


def policy_like(directory: Path, seed: int) -> torch.nn.Module:
    """The same architecture with other weights."""
    policy = load_policy(str(directory), dropout=False)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    return policy


def digits(prompts: list, completions: list, **_) -> list[float]:
    return [float(sum(map(str.isdigit, text))) for text in completions]


def config_of(directory: Path, model: Path, **changes) -> GRPOConfig:
    rows = directory / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    options = dict(
        model=str(model),
        dataset=str(rows),
        output_dir=str(directory / "run"),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=8,
        max_steps=10,
        save_steps=0,
    )
    return GRPOConfig(**options | changes)


def there(server: Served, **changes) -> dict:
    return {"sampler": "vllm", "sampler_url": [server.url], "sampler_timeout": 60.0} | changes


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").open()]


def test_greedy_completions_and_log_probabilities_are_those_of_the_local_sampler(server, model):
    tokenizer = load_tokenizer(str(model))
    options = SamplingOptions(num_generations=2, max_new_tokens=24, greedy=True)
    for step in (1, 2):  # the second time with weights that the server has to be given
        policy = policy_like(model, seed=step)
        sampler = VLLMSampler([server.url], policy, tokenizer, timeout=60.0)
        sampler.sync(policy, step)
        here = LocalSampler(policy, tokenizer).sample(PROMPTS, options)
        far = sampler.sample(PROMPTS, options)
        sampler.close()
        assert torch.equal(here.input_ids, far.input_ids)
        assert here.completions == far.completions
        torch.testing.assert_close(here.sampling_logp, far.sampling_logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.5}])
def test_log_probabilities_are_of_the_distribution_that_was_drawn_from(server, model, options):
    tokenizer, policy = load_tokenizer(str(model)), policy_like(model, seed=3)
    sampler = VLLMSampler([server.url], policy, tokenizer, timeout=60.0)
    sampler.sync(policy, 0)
    wanted = SamplingOptions(num_generations=4, max_new_tokens=1, **options)
    far = sampler.sample(PROMPTS, wanted, seed=5)
    again = sampler.sample(PROMPTS, wanted, seed=5)
    sampler.close()
    assert torch.equal(far.input_ids, again.input_ids)
    with torch.no_grad():
        logits = completion_logits(policy, far.input_ids, far.attention_mask, 1)[:, 0]
    kept = truncated((logits / wanted.temperature).softmax(-1), wanted.top_p, wanted.top_k)
    expected = (kept / kept.sum(-1, keepdim=True)).gather(1, far.completion_ids).log()
    torch.testing.assert_close(far.sampling_logp, expected, rtol=0, atol=1e-4)


def test_more_prompts_than_a_pass_of_the_server_takes_are_sampled_the_same_each_time(server, model):
    tokenizer, policy = load_tokenizer(str(model)), policy_like(model, seed=3)
    sampler = VLLMSampler([server.url], policy, tokenizer, timeout=60.0)
    sampler.sync(policy, 0)
    prompts = [f"{number} + {PROMPTS[0]}" for number in range(64)]
    options = SamplingOptions(num_generations=8, max_new_tokens=4)
    first, again = (sampler.sample(prompts, options, seed=5) for _ in range(2))
    sampler.close()
    assert first.attention_mask.sum() > 4096
    assert torch.equal(first.input_ids, again.input_ids)


def test_grpo_learns_as_it_does_with_the_local_sampler(server, model, tmp_path):
    last: dict[str, list[float]] = {"local": [], "vllm": []}
    for seed in range(3):
        for name in last:
            directory = tmp_path / f"{name}-{seed}"
            directory.mkdir()
            options = there(server) if name == "vllm" else {}
            train_grpo(config_of(directory, model, seed=seed, **options), reward_funcs=[digits])
            metrics = lines(directory / "run")
            last[name].append(statistics.mean(line["reward"] for line in metrics[-3:]))
            if name == "vllm":
                assert all(line["sampling/logp_difference/max"] < 1e-4 for line in metrics)
    # of the eight tokens of a completion, digits from almost none to almost all
    assert min(last["vllm"]) > 4
    assert abs(statistics.mean(last["vllm"]) - statistics.mean(last["local"])) < 1.5


def test_a_server_of_another_vocabulary_is_refused_at_the_start(server, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    other = tmp_path / "other"
    Qwen2ForCausalLM(Qwen2Config(vocab_size=512, **sizes, **heads)).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(UserError, match="does not know the policy's token 511"):
        train_grpo(config_of(tmp_path, other, **there(server)), reward_funcs=[digits])
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_killed_costs_nothing_that_was_saved(server, model, tmp_path):
    calls = 0

    def killing(prompts: list, completions: list, **_) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            server.stop(signal.SIGKILL)
        return digits(prompts, completions)

    options = there(server, sampler_timeout=3.0)
    config = config_of(tmp_path, model, max_steps=6, save_steps=1, **options)
    with pytest.raises(UserError) as raised:
        train_grpo(config, reward_funcs=[killing])
    assert server.url in str(raised.value) and "checkpoint-3 is intact" in str(raised.value)
    server.start()
    config = dataclasses.replace(config, resume=True, sampler_timeout=60.0)
    assert train_grpo(config, reward_funcs=[killing]).steps == 6
    metrics = lines(tmp_path / "run")
    assert [line["step"] for line in metrics] == list(range(1, 7))
    assert all(line["sampling/logp_difference/max"] < 1e-4 for line in metrics)


def test_a_stale_head_ends_the_run_and_a_head_by_its_own_name_is_not_stale(
    server, model, tmp_path, monkeypatch
):
    """Plain vLLM on a model with a tied head takes new tied weights, and keeps its old head."""
    server.stop()
    words = [str(VLLM), "serve", str(model), "--host", "127.0.0.1", "--dtype", "float32"]
    words += [*serve.FLAGS, *serve.CPU_FLAGS, "--enforce-eager", "--max-model-len", "128"]
    tied = Served(model, tmp_path, words)
    try:
        train_grpo(config_of(tmp_path, model, **there(tied)), reward_funcs=[digits])
        differences = [line["sampling/logp_difference/max"] for line in lines(tmp_path / "run")]
        assert max(differences) < 1e-4
        monkeypatch.setattr(served_weights, "is_tied", lambda policy: False)
        options = there(tied, overwrite_output_dir=True)
        with pytest.raises(UserError, match="the server does not sample from this policy"):
            train_grpo(config_of(tmp_path, model, **options), reward_funcs=[digits])
    finally:
        tied.stop()
