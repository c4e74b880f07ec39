"""verl's functions served by rlcore, put back again, and its plugin and own tests with ours in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import verl
import verl.trainer.ppo.core_algos as core
import verl.utils.kernel.linear_cross_entropy as fused
import verl.utils.torch_functional as functional
import verl.workers.engine.fsdp.transformer_impl as engine
from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers import dense_common

from rlcore.integrations import verl as rl_verl
from rlcore.integrations.bindings import ChangedPeer

HERE = Path(__file__).resolve().parent
SITE = Path(verl.__file__).resolve().parents[1]
OWN_TESTS = [
    path
    for name in ("core_algos_on_cpu", "reinforce_pp_multiturn_on_cpu", "rollout_corr_integration")
    if (path := SITE / f"tests/trainer/ppo/test_{name}.py").is_file()
]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    rl_verl.unpatch()


def attributes() -> dict[tuple[str, str], int]:
    """The identity of all that the modules of verl bind."""
    return {
        (path, name): id(value)
        for path, module in sys.modules.items()
        if path == "verl" or path.startswith("verl.")
        if isinstance(module, types.ModuleType)
        for name, value in vars(module).items()
    }


def test_patch_serves_every_binding_and_unpatch_restores_every_attribute():
    before = attributes()
    theirs = functional.logprobs_from_logits
    assert engine.logprobs_from_logits is theirs
    rl_verl.patch()
    assert functional.logprobs_from_logits is rl_verl.logprobs_from_logits
    assert engine.logprobs_from_logits is rl_verl.logprobs_from_logits
    assert fused.linear_cross_entropy is not fused.LinearCrossEntropy.apply
    changed = {key for key, value in attributes().items() if before.get(key) != value}
    assert {name for _, name in changed} == {
        "logprobs_from_logits", "linear_cross_entropy", "compute_gae_advantage_return",
    }  # fmt: skip
    rl_verl.unpatch()
    assert attributes() == before
    rl_verl.unpatch()
    assert attributes() == before


def test_a_module_that_bound_ours_while_patched_gets_verls_back(monkeypatch):
    late = types.ModuleType("verl.imported_late")
    with rl_verl.patch():
        late.logprobs_from_logits = functional.logprobs_from_logits
        monkeypatch.setitem(sys.modules, late.__name__, late)
    assert late.logprobs_from_logits is functional.logprobs_from_logits
    assert late.logprobs_from_logits is not rl_verl.logprobs_from_logits


def test_patching_twice_is_refused_and_patching_again_is_not():
    with rl_verl.patch(), pytest.raises(RuntimeError, match="patched already"):
        rl_verl.patch()
    with rl_verl.patch():
        assert functional.logprobs_from_logits is rl_verl.logprobs_from_logits


def test_a_changed_signature_is_refused_by_name_and_nothing_is_patched(monkeypatch):
    def logprobs_from_logits(logits, labels, temperature):
        return logits

    monkeypatch.setattr(functional, "logprobs_from_logits", logprobs_from_logits)
    before = attributes()
    message = rf"verl {verl.__version__}: .*logprobs_from_logits takes \(logits, labels, temper"
    with pytest.raises(ChangedPeer, match=message):
        rl_verl.patch()
    assert attributes() == before


def test_a_changed_loss_is_refused_and_nothing_is_registered(monkeypatch):
    monkeypatch.setattr(core, "compute_policy_loss_vanilla", lambda log_prob: log_prob)
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", {})
    with pytest.raises(ChangedPeer, match="old_log_prob, log_prob"):
        rl_verl.register()
    assert not core.POLICY_LOSS_REGISTRY


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 2, 3)])
@pytest.mark.parametrize("inplace", [False, True])
def test_logprobs_and_gradient_are_verls(shape, inplace):
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(*shape, 33, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 33, shape, generator=generator)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)

    def run():
        logp = engine.logprobs_from_logits(
            logits=leaf / 0.7, labels=labels, inplace_backward=inplace
        )
        return logp.detach(), *torch.autograd.grad(logp, leaf, upstream)

    want = run()
    with rl_verl.patch():
        got = run()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[:, :4], lambda x: x[:, :1].expand(2, 4, 9)]
)
def test_storage_of_a_leaf_or_of_an_expanded_tensor_is_left_alone(view):
    logits = torch.randn(2, 6, 9, requires_grad=True)
    kept = logits.detach().clone()
    rows = view(logits)
    labels = torch.arange(rows.shape[1]).expand(2, -1)
    rl_verl.logprobs_from_logits(rows, labels).sum().backward()
    assert torch.equal(logits.detach(), kept)
    assert logits.grad.abs().sum() > 0


def test_storage_is_given_to_the_gradient_where_verl_permits_it():
    leaf = torch.randn(4, 9, requires_grad=True)
    for permitted in (True, False):
        logits = leaf * 1
        kept = logits.detach().clone()
        logp = rl_verl.logprobs_from_logits(logits, torch.arange(4), inplace_backward=permitted)
        logp.sum().backward()
        assert torch.equal(logits.detach(), kept) != permitted


def test_bfloat16_logits_give_float32_logprobs():
    """verl's loop rounds them to bfloat16, flash-attn's kernel and ours do not."""
    logits = 5 * torch.randn(6, 50, dtype=torch.bfloat16)
    labels = torch.arange(6)
    logp = rl_verl.logprobs_from_logits(logits, labels)
    assert logp.dtype == torch.float32
    want = functional.logprobs_from_logits(logits.double(), labels)
    torch.testing.assert_close(logp.double(), want, rtol=1e-6, atol=1e-6)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def test_verls_fused_forward_runs_on_ours_and_equals_the_logits_path():
    model = tiny_model()
    tokens = torch.randint(0, 61, (1, 13), generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 13, generator=torch.Generator().manual_seed(2)).double()
    with rl_verl.patch():
        output = dense_common.forward_with_triton_backend(
            model, input_ids=tokens, temperature=0.8, return_dict=True
        )
    assert output.log_probs.shape == output.entropy.shape == (13,)
    got = torch.stack([output.log_probs, output.entropy])
    logits = model(tokens).logits[0] / 0.8
    labels = tokens.roll(-1, 1)[0]
    want = torch.stack(
        [functional.logprobs_from_logits(logits, labels), functional.entropy_from_logits(logits)]
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    gradients = [torch.autograd.grad(x, list(model.parameters()), upstream) for x in (got, want)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_fused_call_that_is_not_ours_reaches_verls(monkeypatch):
    """Vocabulary-parallel heads and reductions stay with verl's kernel, untouched."""
    calls = []
    monkeypatch.setattr(fused, "linear_cross_entropy", lambda *arguments: calls.append(arguments))
    with rl_verl.patch():
        fused.linear_cross_entropy(1, 2, 3, 0.5, "mean")
        fused.linear_cross_entropy(1, 2, 3, 0.5, "none", "group")
    assert calls == [(1, 2, 3, 0.5, "mean", None), (1, 2, 3, 0.5, "none", "group")]


def run_python(folder: Path, *words: object, **environment: str) -> str:
    """From an empty folder, so that what is found is what is installed."""
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SITE), str(HERE)])}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder,
        env=inherited | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


PRINT_NAMES = """
import verl
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
print(get_policy_loss_fn("rlcore_ppo").__name__, get_adv_estimator_fn("rlcore_rloo").__name__)
"""


def test_importing_verl_registers_ours_by_the_module_variable(tmp_path):
    plugin = {"VERL_USE_EXTERNAL_MODULES": "rlcore.integrations.verl_plugin"}
    printed = run_python(tmp_path, "-c", PRINT_NAMES, VERL_USE_EXTERNAL_PLUGINS="none", **plugin)
    assert printed.split() == ["rlcore_ppo", "rloo"]


@pytest.mark.skipif(
    "verl.plugins" not in Path(verl.__file__).read_text("utf-8"),
    reason="verl before 0.9 knows no entry-point group",
)
def test_importing_verl_registers_ours_by_the_entry_point(tmp_path):
    printed = run_python(tmp_path, "-c", PRINT_NAMES, VERL_USE_EXTERNAL_PLUGINS="rlcore")
    assert printed.split() == ["rlcore_ppo", "rloo"]


PATCH_A_WORKER = """
from verl.utils.import_utils import import_external_libs
for _ in range(2):
    import_external_libs("rlcore.integrations.verl_patched")
import verl.workers.engine.fsdp.transformer_impl as engine
print(engine.logprobs_from_logits.__module__)
"""


def test_an_external_lib_patches_the_engine_that_is_imported_after_it(tmp_path):
    assert run_python(tmp_path, "-c", PATCH_A_WORKER).split() == ["rlcore.integrations.verl"]


def test_the_example_shows_no_difference(tmp_path):
    printed = run_python(tmp_path, HERE.parent / "examples" / "verl_losses.py")
    differences = [float(line.split()[-1]) for line in printed.splitlines() if "largest" in line]
    assert len(differences) == 5 and max(differences) < 1e-5


@pytest.mark.skipif(not OWN_TESTS, reason="this verl comes without its tests")
def test_verls_own_tests_pass_on_our_functions(tmp_path):
    options = ("-p", "serve_verl", "-p", "no:cacheprovider", "-c", os.devnull)
    printed = run_python(tmp_path, "-m", "pytest", *options, f"--rootdir={SITE}", *OWN_TESTS)
    assert int(re.search(r"(\d+) passed", printed)[1]) >= 25
    assert "failed" not in printed
