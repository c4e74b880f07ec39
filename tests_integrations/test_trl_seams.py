"""Where TRL is taken over and where it is let through, and that every attribute comes back."""

from __future__ import annotations

import logging
import os
import sys
from types import ModuleType

import pytest
import torch
import trl
import trl.trainer.utils as utils
from peft import LoraConfig
from trl import GRPOTrainer
from trl_runs import assert_same, make_trainer, run

import rlcore as rl
from rlcore.integrations import trl as rl_trl
from rlcore.integrations.trl import ChangedPeer
from rlcore.integrations.trl import head as trl_head
from rlcore.integrations.trl import plans as trl_plans
from rlcore.integrations.trl import policy as trl_policy

HAS_KERNEL = hasattr(utils, "add_fused_lm_head")
kernel_only = pytest.mark.skipif(not HAS_KERNEL, reason="this TRL has no chunked head")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("trl")


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "rlcore.integrations.trl")
    return caplog


@pytest.mark.skipif("RLCORE_TRL" not in os.environ, reason="any version will do")
def test_the_version_under_test_is_the_one_asked_for():
    assert trl.__version__.startswith(os.environ["RLCORE_TRL"] + ".")


def attributes() -> dict[tuple[str, str], object]:
    """Every attribute of every loaded module of TRL, and of every class in them."""
    found = {}
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] != "trl" or not isinstance(module, ModuleType):
            continue
        for name, value in vars(module).items():
            found[path, name] = value
            if isinstance(value, type) and value.__module__.startswith("trl"):
                for inner, attribute in vars(value).items():
                    found[f"{path}.{name}", inner] = attribute
    return found


def changed(before: dict, after: dict) -> set[tuple[str, str]]:
    return {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}


def test_unpatching_restores_every_attribute():
    with rl_trl.patch():
        pass
    before = attributes()
    rl_trl.patch()
    taken = changed(before, attributes())
    rl_trl.unpatch()
    assert {name for _, name in taken} >= {"_compute_loss", trl_policy.METHOD}
    assert len(taken) > 4
    assert changed(before, attributes()) == set()
    rl_trl.unpatch()


def test_the_log_says_which_seams_are_in_use(log):
    with rl_trl.patch() as patched:
        assert patched.seams.keys() == {"policy", "kernel" if HAS_KERNEL else "logits"}
    for seam in patched.seams:
        assert f"{seam} seam" in log.text


def test_patching_twice_is_refused():
    with rl_trl.patch(), pytest.raises(RuntimeError, match="patched already"):
        rl_trl.patch()


@pytest.mark.parametrize("name", ["_compute_loss", trl_policy.METHOD])
def test_a_changed_method_is_refused_and_nothing_patched(monkeypatch, name):
    monkeypatch.setattr(GRPOTrainer, name, lambda self, model, batch: None)
    before = attributes()
    with pytest.raises(ChangedPeer, match="nothing was patched"):
        rl_trl.patch()
    assert changed(before, attributes()) == set()


def test_a_changed_head_is_refused_and_nothing_patched(monkeypatch):
    if HAS_KERNEL:
        theirs = utils._ChunkedLogProbFunction
        monkeypatch.setattr(theirs, "forward", staticmethod(lambda ctx, hidden, head: None))
    else:
        monkeypatch.setattr(utils, "selective_log_softmax", lambda logits, labels: None)
    before = attributes()
    with pytest.raises(ChangedPeer, match="nothing was patched"):
        rl_trl.patch()
    assert changed(before, attributes()) == set()


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_every_trainer_goes_through_our_functions(directory, monkeypatch, kind):
    names = ("linear_token_logprob", "linear_policy_loss", "token_logprob")
    calls = []
    for name in names:
        theirs = getattr(rl, name)
        monkeypatch.setattr(
            rl,
            name,
            lambda *a, theirs=theirs, **o: calls.append(theirs.__name__) or theirs(*a, **o),
        )
    with rl_trl.patch():
        run(kind, directory, max_steps=1)
    want = {"GRPO": names[1], "RLOO": names[1], "SFT": names[0] if HAS_KERNEL else names[1]}
    assert want.get(kind, names[0] if HAS_KERNEL else names[2]) in calls


def test_the_mixin_does_for_one_class_what_the_patch_does_for_all(directory, log, monkeypatch):
    plain = run("GRPO", directory, num_iterations=2)

    class Fused(rl_trl.FusedLogpsMixin, GRPOTrainer):
        pass

    monkeypatch.setattr("trl.GRPOTrainer", Fused)
    assert_same(run("GRPO", directory, num_iterations=2), plain)
    assert "the whole policy loss is fused" in log.text
    with rl_trl.patch():
        assert_same(run("GRPO", directory, num_iterations=2), plain)


def first_inputs(trainer) -> dict:
    """The first micro-batch that the trainer would take, with old log-probabilities."""
    rows = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 2
    inputs = trainer._prepare_inputs(rows)
    shape = inputs["completion_ids"].shape
    generator = torch.Generator().manual_seed(5)
    inputs["old_per_token_logps"] = -5 + torch.rand(shape, generator=generator)
    return inputs


def loss_and_gradient(trainer, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    trainer.model.train().zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_tool_tokens_and_vllms_ratios_count_as_in_trl(directory, log, loss_type):
    trainer = make_trainer("GRPO", directory, loss_type=loss_type)
    inputs = first_inputs(trainer)
    tools = torch.ones_like(inputs["completion_mask"])
    tools[:, 2:5] = 0
    ratio = 0.5 + torch.rand(tools.shape, generator=torch.Generator().manual_seed(6))
    inputs |= {"tool_mask": tools, "importance_sampling_ratio": ratio}
    # what a policy never says: exp(logp - old_logp) overflows where a tool speaks
    inputs["old_per_token_logps"][:, 2:5] = -200.0
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    with rl_trl.patch():
        loss, gradient = loss_and_gradient(trainer, inputs)
    assert "the whole policy loss is fused" in log.text and "not the fused one" not in log.text
    inputs["old_per_token_logps"][:, 2:5] = -5.0
    want, want_gradient = loss_and_gradient(trainer, inputs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-7)
    assert (gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm()


def test_a_batch_with_images_has_trls_own_loss(directory, log):
    trainer = make_trainer("GRPO", directory)
    with rl_trl.patch():
        plan = trl_plans.PLANS["GRPOTrainer"](trainer, first_inputs(trainer) | {"num_images": [1]})
    assert plan == "the batch has num_images"


def test_advantages_per_token_count_as_in_trl(directory, log):
    trainer = make_trainer("GRPO", directory, loss_type="dr_grpo", beta=0.1,
                           use_bias_correction_kl=False)  # fmt: skip
    inputs = first_inputs(trainer)
    generator = torch.Generator().manual_seed(7)
    inputs["advantages"] = torch.randn(inputs["completion_ids"].shape, generator=generator)
    with rl_trl.patch():
        loss, gradient = loss_and_gradient(trainer, inputs)
    assert "not the fused one" not in log.text
    want, want_gradient = loss_and_gradient(trainer, inputs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-7)
    assert (gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm()


def test_a_loss_that_is_not_ours_is_noticed_and_left_to_trl(directory, log, monkeypatch):
    plain = run("GRPO", directory)
    wrong = ("ppo_clip", "seq-mean-token-sum", trl_plans._rows)
    monkeypatch.setitem(trl_plans.LOSS_TYPES, "dapo", wrong)
    with rl_trl.patch():
        patched = run("GRPO", directory)
    assert "not the fused one" in log.text
    assert patched.losses == pytest.approx(plain.losses, rel=1e-5, abs=1e-6)


def test_rloo_with_dropout_has_no_ratio_of_one_and_is_left_to_trl(directory, log):
    trainer = make_trainer("RLOO", directory, max_steps=1)
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    with rl_trl.patch():
        trainer.train()
    assert "not the fused one" in log.text


def test_a_lora_adapter_on_the_head_is_refused_by_trl_or_left_to_it(directory, log):
    from transformers import AutoModelForCausalLM

    adapter = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    make_trainer("GRPO", directory)

    def trained() -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(directory / "model")
        trainer = make_trainer("GRPO", directory, model, adapter, max_steps=2)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    with rl_trl.patch():
        if HAS_KERNEL:
            with pytest.raises(ValueError, match="lm_head"):
                trained()
            return
        patched = trained()
    assert "not a plain linear layer" in log.text
    assert patched == pytest.approx(trained(), rel=1e-5, abs=1e-6)


def statistics_or_theirs(trainer, **options):
    """What `token_statistics` gives, "theirs" where it calls TRL's own."""
    tokens = torch.ones(1, 4, dtype=torch.long)
    return trl_policy.token_statistics(
        trainer, lambda *_, **given: ("theirs", given), trainer.model, tokens, tokens, 2, **options
    )


def test_images_and_models_that_see_them_are_left_to_trl(directory, log):
    trainer = make_trainer("GRPO", directory)
    images = torch.zeros(1)
    whose, given = statistics_or_theirs(trainer, pixel_values=images)
    assert whose == "theirs" and given["pixel_values"] is images
    assert "more than tokens" in log.text
    trainer.model.config.vision_config = {}
    assert statistics_or_theirs(trainer)[0] == "theirs"
    assert "also sees images" in log.text
    assert statistics_or_theirs(make_trainer("GRPO", directory))[0].shape == (1, 2)


def test_a_routers_loss_is_left_to_trl(directory, log):
    trainer = make_trainer("GRPO", directory)
    assert statistics_or_theirs(trainer, compute_aux_loss=True)[0] == "theirs"
    assert "router" in log.text


def test_evaluation_gives_trls_loss(directory):
    def loss() -> dict:
        trainer = make_trainer("GRPO", directory, num_generations_eval=4)
        torch.manual_seed(11)
        return trainer.evaluate(trainer.train_dataset.select(range(4)))

    plain = loss()
    with rl_trl.patch():
        patched = loss()
    for name in ("eval_loss", "eval_entropy", "eval_reward"):
        assert patched[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-6)


@kernel_only
@pytest.mark.parametrize("softcap, bias", [(None, True), (None, False), (3.0, True)])
def test_all_that_trls_kernel_gives_is_given(softcap, bias):
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(64, 9, generator=generator)
    weight = torch.randn(37, 9, generator=generator)
    bias = torch.randn(37, generator=generator) if bias else None
    theirs = utils._ChunkedLogProbFunction
    ours = trl_head.make_kernel(theirs)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    # some tokens are likeliest, some second, the rest anything
    target = logits.argmax(-1)
    target[::3] = logits.topk(2).indices[::3, 1]
    target[1::3] = torch.randint(37, target[1::3].shape, generator=generator)
    results = []
    for function in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = function.apply(*leaves, bias, target, 0.8, 16, softcap, 1.3)
        (out[0].sum() - 0.3 * out[1].sum()).backward()
        results.append((*out, *(leaf.grad for leaf in leaves)))
    for theirs_value, value in zip(*results, strict=True):
        torch.testing.assert_close(value, theirs_value, rtol=1e-4, atol=1e-4)
    assert 0 < results[1][4].sum() < 64
    assert ours.apply(hidden, weight, bias, target, 1.0, 16, None, 1.0, ("log_probs",))[1:] == (
        None, None, None, None,
    )  # fmt: skip


@kernel_only
def test_trls_kernel_runs_where_ours_does_not():
    calls = []

    class Theirs:
        @staticmethod
        def apply(*args):
            calls.append(args)

    kernel = trl_head.make_kernel(Theirs)
    hidden, weight, target = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.long)
    kernel.apply(hidden, weight, None, target, 1.0, 16, None, 0.0, ("log_probs",))
    weight.ds_id = 7
    kernel.apply(hidden, weight, None, target, 1.0, 16, None, 1.0, ("log_probs",))
    assert [len(args) for args in calls] == [9, 9]
