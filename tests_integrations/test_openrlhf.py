"""OpenRLHF's actor and losses served by rlcore, against its own in float64, and put back again."""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from openrlhf_package import actor, loss, models, utils
from transformers import LlamaConfig, LlamaForCausalLM

from rlcore.integrations import openrlhf as rl_openrlhf
from rlcore.integrations.bindings import ChangedPeer

VERSION = tuple(int(part) for part in importlib.metadata.version("openrlhf").split(".")[:3])
# OpenRLHF divides by a sequence's tokens + 1e-8
CLOSE = {"rtol": 1e-7, "atol": 1e-12}
GLOBAL_COUNTS = {"dp_size": 4, "batch_num_tokens": 83.0, "global_batch_size": 24.0}
COUNTS = [{}, GLOBAL_COUNTS] if VERSION >= (0, 11, 0) else [{}]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    rl_openrlhf.unpatch()


def random_tensors(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


def random_mask(rows: int = 6, length: int = 9) -> torch.Tensor:
    lengths = torch.tensor([9, 1, 4, 7, 2, 5])[:rows, None]
    return (torch.arange(length) < lengths).double()


def both(run, *leaves: torch.Tensor):
    """What `run` gives of OpenRLHF and of ours, with the gradients of its first result."""
    results = []
    for patch in (None, rl_openrlhf.patch):
        if patch is not None:
            patch()
        out = run()
        out = out if isinstance(out, tuple) else (out,)
        gradients = torch.autograd.grad(out[0].sum(), leaves)
        results.append([None if x is None else x.detach() for x in (*out, *gradients)])
    rl_openrlhf.unpatch()
    return results


def assert_same(theirs, ours, **close):
    assert len(theirs) == len(ours)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **(close or CLOSE))


def policy_batch(seed: int = 0, spread: float = 0.5):
    old, step, advantages = random_tensors(3, 6, 9, seed=seed)
    old = -0.05 - old.abs()
    log_probs = (old + spread * step).clamp(max=-1e-3).requires_grad_()
    return log_probs, old, advantages


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize(("kind", "token_level"), [("ppo", True), ("ppo", False), ("gspo", False)])
def test_policy_loss_its_metrics_and_gradient(kind, token_level, dual_clip, counts):
    log_probs, old, advantages = policy_batch(spread=0.5 if kind == "ppo" else 1.5)
    module = models.PolicyLoss(
        0.15, 0.3, dual_clip=dual_clip, token_level_loss=token_level, policy_loss_type=kind
    )
    theirs, ours = both(
        lambda: module(log_probs, old, advantages, random_mask(), **counts), log_probs
    )
    assert theirs[1] > 0.1 and theirs[-1].abs().max() > 1e-3
    assert_same(theirs, ours)


@pytest.mark.skipif(VERSION < (0, 11, 0), reason="0.10 does not clamp the log-ratio")
def test_policy_loss_where_ratios_are_beyond_what_openrlhf_clamps():
    log_probs, old, advantages = policy_batch()
    with torch.no_grad():
        log_probs[0] = old[0] + 25.0
        log_probs[3] = old[3] - 25.0
    module = models.PolicyLoss()
    run = lambda: module(log_probs, old, advantages, random_mask())  # noqa: E731
    # the clamp at exp(-20) has no gradient; without it there is one of at most exp(-25)
    assert_same(*both(run, log_probs), rtol=1e-7, atol=1e-8)


def test_masked_tokens_have_no_effect_whatever_they_hold():
    log_probs, old, advantages = policy_batch()
    mask = random_mask()
    module = models.PolicyLoss()
    rl_openrlhf.patch()
    clean = torch.autograd.grad(module(log_probs, old, advantages, mask)[0], log_probs)[0]
    with torch.no_grad():
        log_probs[mask == 0] = torch.nan
    dirty = torch.autograd.grad(module(log_probs, old, advantages, mask)[0], log_probs)[0]
    assert torch.equal(clean, dirty) and not dirty[mask == 0].any()


CORRECTION = (
    {"is_correction_level": "token"}
    if VERSION >= (0, 11, 2)
    else {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [0.5, 5.0]}
)


def test_a_correction_for_the_sampler_stays_openrlhfs_and_says_so(caplog):
    log_probs, old, advantages = policy_batch()
    rollout = old + 0.1 * random_tensors(1, 6, 9, seed=3)[0]
    module = models.PolicyLoss(**CORRECTION)
    run = lambda: module(log_probs, old, advantages, random_mask(), rollout)  # noqa: E731
    rl_openrlhf._told.clear()
    with caplog.at_level("INFO", logger="rlcore.integrations.openrlhf"):
        theirs, ours = both(run, log_probs)
        run()
    assert_same(theirs, ours, rtol=0, atol=0)
    said = [r.message for r in caplog.records if "is OpenRLHF's own" in r.message]
    assert len(said) == 1 and "PolicyLoss with" in said[0] and "correction" in said[0]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("clip_eps", [None, 0.2])
def test_value_loss_and_gradient(clip_eps, token_level, counts):
    values, old, returns = random_tensors(3, 6, 9)
    values.requires_grad_()
    module = models.ValueLoss(clip_eps, token_level)
    assert_same(*both(lambda: module(values, old, returns, random_mask(), **counts), values))


def test_losses_without_a_mask_count_every_token():
    log_probs, old, advantages = policy_batch()
    values, old_values, returns = random_tensors(3, 6, 9, seed=1)
    values.requires_grad_()
    assert_same(*both(lambda: models.ValueLoss(0.2)(values, old_values, returns), values))
    mask = torch.ones(6, 9, dtype=torch.float64)
    module = models.PolicyLoss()
    assert_same(*both(lambda: module(log_probs, old, advantages, mask), log_probs))
    rl_openrlhf.patch()
    unmasked, masked = (module(log_probs, old, advantages, m)[0] for m in (None, mask))
    assert torch.equal(unmasked, masked)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize("with_margin", [False, True])
def test_pairwise_loss_and_gradient(with_margin, shape):
    chosen, rejected, margin = random_tensors(3, *shape)
    leaves = [x.requires_grad_() for x in (chosen, rejected)]
    margin = margin.abs() if with_margin else None
    assert_same(*both(lambda: models.PairWiseLoss()(*leaves, margin), *leaves))


@pytest.mark.parametrize(("smoothing", "ipo"), [(0.0, False), (0.1, False), (0.0, True)])
def test_dpo_loss_rewards_and_gradient(smoothing, ipo):
    logps = random_tensors(4, 7)
    leaves = [x.requires_grad_() for x in logps[:2]]
    module = models.DPOLoss(0.3, smoothing, ipo)
    assert_same(*both(lambda: module(*leaves, *logps[2:]), *leaves))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_gradient(temperature):
    (logits,) = random_tensors(1, 2, 5, 31)
    logits.requires_grad_()
    labels = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(0))
    (upstream,) = random_tensors(1, 2, 5, seed=1)

    def run():
        # OpenRLHF's divides the logits in place
        return (actor.log_probs_from_logits(logits * 1, labels, temperature) * upstream).sum()

    assert_same(*both(run, logits), rtol=1e-12, atol=1e-13)


def test_entropy_and_gradient(monkeypatch):
    # OpenRLHF's is compiled; the formula inside is what counts here
    monkeypatch.setattr(actor, "compute_entropy", inspect.unwrap(utils.compute_entropy))
    theirs = actor.compute_entropy
    (logits,) = random_tensors(1, 2, 5, 31)
    logits.requires_grad_()
    (upstream,) = random_tensors(1, 2, 5, seed=1)
    for one, other in itertools.pairwise(
        [(entropy(logits), *torch.autograd.grad(entropy(logits), logits, upstream))
         for entropy in (theirs, rl_openrlhf.compute_entropy)]
    ):  # fmt: skip
        assert_same(one, other, rtol=1e-12, atol=1e-13)


def test_entropy_of_banned_tokens_is_a_number():
    """OpenRLHF's is 0 * -inf, NaN, for a token that a logits processor has banned."""
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    assert inspect.unwrap(utils.compute_entropy)(logits).isnan().all()
    assert rl_openrlhf.compute_entropy(logits).item() == pytest.approx(0.6931472)


def tiny_actor(temperature: float) -> actor.Actor:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    tiny = actor.Actor(LlamaForCausalLM(config), temperature=temperature)
    tiny.packing_samples = False
    return tiny


def test_the_actors_forward_on_ours_gives_the_same_numbers_and_gradients(monkeypatch):
    monkeypatch.setattr(actor, "compute_entropy", inspect.unwrap(utils.compute_entropy))
    monkeypatch.setattr(utils, "compute_entropy", actor.compute_entropy)
    # before 0.11.1 it scales the logits in place, after the entropy has saved them for its gradient
    tiny = tiny_actor(0.8 if VERSION >= (0, 11, 1) else 1.0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 41, (3, 12), generator=generator)
    attention = torch.ones_like(tokens)
    attention[1, :4] = 0
    parameters = list(tiny.parameters())
    calls = []
    count = rl_openrlhf.token_logprob
    monkeypatch.setattr(
        rl_openrlhf, "token_logprob", lambda *a, **k: calls.append(1) or count(*a, **k)
    )

    def run():
        logp, output = tiny(
            tokens, action_mask=torch.ones(3, 6), attention_mask=attention, return_output=True,
            return_entropy=True,
        )  # fmt: skip
        return (logp + 0.3 * output.entropy[:, -6:]).square().sum(), logp, output.entropy

    theirs, ours = both(run, *parameters)
    assert len(calls) == 2
    assert_same(theirs, ours, rtol=1e-4, atol=1e-5)


def attributes() -> dict[tuple[str, str], int]:
    """The identity of all that OpenRLHF's modules, and their classes, bind."""
    found = {}
    for path, module in list(sys.modules.items()):
        if path.startswith("openrlhf.") and isinstance(module, types.ModuleType):
            for name, value in vars(module).items():
                found[path, name] = id(value)
                if isinstance(value, type) and value.__module__.startswith("openrlhf"):
                    found |= {(path, f"{name}.{k}"): id(v) for k, v in vars(value).items()}
    return found


def test_unpatching_restores_every_attribute():
    before = attributes()
    kept = loss.PolicyLoss.forward
    rl_openrlhf.patch()
    assert actor.log_probs_from_logits is rl_openrlhf.log_probs_from_logits
    assert actor.compute_entropy is utils.compute_entropy is rl_openrlhf.compute_entropy
    changed = {name for (_, name), value in attributes().items() if value not in before.values()}
    assert changed == {
        "log_probs_from_logits", "compute_entropy",
        *(f"{name}.forward" for name in ("PolicyLoss", "ValueLoss", "PairWiseLoss", "DPOLoss")),
    }  # fmt: skip
    rl_openrlhf.unpatch()
    assert attributes() == before and loss.PolicyLoss.forward is kept


def test_patching_twice_is_refused():
    with rl_openrlhf.patch(), pytest.raises(RuntimeError, match="patched already"):
        rl_openrlhf.patch()


def test_a_changed_loss_is_refused_and_nothing_is_patched(monkeypatch):
    def forward(self, log_probs, advantages):
        return log_probs

    monkeypatch.setattr(loss.PolicyLoss, "forward", forward)
    before = attributes()
    with pytest.raises(ChangedPeer, match=r"takes \(self, log_probs, advantages\), and rlcore"):
        rl_openrlhf.patch()
    assert attributes() == before


def test_the_example_shows_no_difference(capsys):
    example = Path(__file__).resolve().parents[1] / "examples" / "openrlhf_losses.py"
    runpy.run_path(str(example), run_name="__main__")
    differences = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(differences) == 5 and max(differences) < 1e-5
