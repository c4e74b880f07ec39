"""What the integrations share, without any peer: names replaced, losses on log-probabilities."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

import rlcore as rl
from rlcore.integrations.bindings import ChangedPeer, NamePatch, require_signature
from rlcore.integrations.logp_loss import policy_loss_from_logp


def theirs(logits, labels):
    return "theirs"


def ours(logits, labels):
    return "ours"


@pytest.fixture
def package(monkeypatch):
    """A package whose two modules bind one function, and another package that binds it too."""
    modules = {name: types.ModuleType(name) for name in ("peer", "peer.a", "peer.b", "peers")}
    for name, module in modules.items():
        module.function = theirs
        monkeypatch.setitem(sys.modules, name, module)
    modules["peer.b"].function = len
    return modules


def test_a_name_is_replaced_where_it_is_the_same_function_in_the_same_package(package):
    with NamePatch("peer") as patch:
        patch.replace("function", theirs, ours)
        assert patch.in_place
        found = {name: module.function for name, module in package.items()}
        assert found == {"peer": ours, "peer.a": ours, "peer.b": len, "peers": theirs}
    assert not patch.in_place
    assert package["peer"].function is package["peer.a"].function is theirs


def test_undo_reaches_a_module_that_bound_ours_in_the_meantime(package, monkeypatch):
    with NamePatch("peer") as patch:
        patch.replace("function", theirs, ours)
        package["peer.b"].function = ours
    assert package["peer.b"].function is theirs


def test_a_signature_is_known_by_the_names_of_its_parameters():
    require_signature(theirs, ("logits",), ("logits", "labels"), version="peer 1.0")
    with pytest.raises(ChangedPeer, match=r"peer 1.0: .*theirs takes \(logits, labels\), and rlc"):
        require_signature(theirs, ("logits", "targets"), version="peer 1.0")


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": "ppo_clip", "delta": 3.0, "loss_agg_mode": "seq-mean-token-mean"},
        {"surrogate": "gmpo", "importance_sampling_level": "sequence", "num_items": 7},
        {"surrogate": "cispo", "epsilon_high": 0.3, "beta": 0.1},
        {"surrogate": "sapo", "surrogate_params": {"tau_neg": 1.2}},
    ],
)
def test_a_loss_on_log_probabilities_is_the_one_on_logits(options):
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (4, 6))
    mask = torch.rand(4, 6) < 0.7
    logp = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    inputs = {
        "old_logp": logp.detach() + 0.3 * torch.randn(4, 6),
        "ref_logp": logp.detach() + 0.3 * torch.randn(4, 6),
        "importance_sampling_ratio": torch.rand(4, 6).double(),
        "mask": mask,
    }
    advantage = torch.randn(4, dtype=torch.float64)
    want = rl.policy_loss(logits, target, advantage, **inputs, **options)
    got = policy_loss_from_logp(logp, advantage, **inputs, **options)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.kl, want.kl)
    assert torch.equal(got.clipped, want.clipped)
    gradients = [torch.autograd.grad(output.loss, logits)[0] for output in (got, want)]
    torch.testing.assert_close(*gradients)


def test_a_loss_on_log_probabilities_refuses_an_option_that_it_would_ignore():
    logp = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="temperature"):
        policy_loss_from_logp(logp, logp, old_logp=logp, mask=logp == 0, temperature=0.5)


IMPORT_WITHOUT_PEERS = """
import sys
import rlcore
print("torch" in sys.modules)
import rlcore.integrations.openrlhf, rlcore.integrations.trl, rlcore.integrations.verl
rlcore.fused_head, rlcore.policy_loss
print([name for name in ("verl", "openrlhf", "trl", "ray", "transformers") if name in sys.modules])
"""


def test_importing_an_integration_imports_no_peer():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_PEERS], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["False", "[]", ""]
