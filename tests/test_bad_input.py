"""Every mistake in the arguments is one clear ValueError that names the argument."""

from __future__ import annotations

import pytest
import torch

import rlcore as rl

N, V = 4, 11
ZEROS = torch.zeros(N)


def arguments(**changed):
    """Good arguments of policy_loss, but for those changed."""
    good = {"logits": torch.randn(N, V), "target": torch.arange(N), "advantage": torch.ones(N)}
    return good | changed


SHARED = {
    "logits of one dimension": ({"logits": torch.randn(V)}, r"logits.*\(N, V\).*\(11,\)"),
    "logits of integers": ({"logits": torch.ones(N, V, dtype=torch.long)}, "logits.*int64"),
    "no columns": ({"logits": torch.randn(N, 0)}, "logits.*column"),
    "target too short": ({"target": torch.arange(3)}, r"target.*\(4,\).*\(3,\)"),
    "target of floats": ({"target": ZEROS}, "target.*integer.*float32"),
    "target out of range": ({"target": torch.tensor([0, V, 1, 2])}, r"target.*11.*position"),
    "target negative": ({"target": torch.tensor([0, -1, 1, 2])}, r"target.*-1.*position"),
    "mask of another shape": ({"mask": torch.ones(N + 1).bool()}, r"mask.*\(4,\).*\(5,\)"),
    "mask of floats": ({"mask": torch.ones(N)}, "mask.*bool.*float32"),
    "temperature zero": ({"temperature": 0.0}, "temperature.*positive.*0"),
    "temperature negative": ({"temperature": -1.0}, "temperature.*positive.*-1"),
    "temperature nan": ({"temperature": float("nan")}, "temperature.*nan"),
    "backend unknown": ({"backend": "tritom"}, "backend.*'triton', 'torch'.*'tritom'"),
}
POLICY = {
    "advantage of another shape": ({"advantage": torch.ones(3)}, r"advantage.*\(4,\).*\(3,\)"),
    "old_logp of another shape": ({"old_logp": torch.ones(N, 1)}, r"old_logp.*\(4,\).*\(4, 1\)"),
    "ref_logp of another shape": ({"ref_logp": torch.ones(1)}, r"ref_logp.*\(4,\).*\(1,\)"),
    "surrogate unknown": ({"surrogate": "ppo"}, "surrogate.*'reinforce', 'ppo_clip'.*'ppo'"),
    "kl_estimator unknown": ({"kl_estimator": "k4"}, "kl_estimator.*'k1', 'k2', 'k3'.*'k4'"),
    "loss_agg_mode unknown": ({"loss_agg_mode": "mean"}, "loss_agg_mode.*'token-mean'.*'mean'"),
    "level unknown": ({"importance_sampling_level": "word"}, "importance_sampling_level.*'word'"),
    "epsilon zero": ({"epsilon": 0.0}, "epsilon.*positive"),
    "epsilon_high negative": ({"epsilon_high": -0.1}, "epsilon_high.*positive"),
    "delta zero": ({"delta": 0.0}, "delta.*positive"),
    "beta without ref_logp": ({"beta": 0.1}, "beta.*ref_logp"),
    "beta infinite": ({"beta": float("inf"), "ref_logp": ZEROS}, "beta.*finite.*inf"),
    "num_items zero": ({"num_items": 0}, "num_items.*positive.*0"),
    "norm_length unused": ({"norm_length": 3}, "norm_length.*seq-mean-token-sum-norm"),
    "delta unused": ({"surrogate": "reinforce", "delta": 2.0}, "reinforce.*delta"),
    "old_logp unused": ({"surrogate": "reinforce", "old_logp": ZEROS}, "reinforce.*old_logp"),
    "unknown parameter": ({"surrogate_params": {"tau": 1.0}}, "surrogate_params.*'tau'"),
    "sequences unmarked": ({"loss_agg_mode": "seq-mean-token-mean"}, r"packed.*cu_seqlens"),
    "cu_seqlens too short": (
        {"loss_agg_mode": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, 3])},
        r"cu_seqlens.*4.*\[0, 3\]",
    ),
    "cu_seqlens of floats": (
        {"loss_agg_mode": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0.0, 4.0])},
        r"cu_seqlens.*integers",
    ),
    "cu_seqlens unused": ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens"),
    "packed without norm_length": (
        {"loss_agg_mode": "seq-mean-token-sum-norm", "cu_seqlens": torch.tensor([0, 4])},
        "norm_length.*packed",
    ),
}


@pytest.mark.parametrize("changed, message", SHARED.values(), ids=SHARED)
def test_token_logprob_refuses(changed, message):
    good = arguments()
    good.pop("advantage")
    with pytest.raises(ValueError, match=message):
        rl.token_logprob(**good | changed)


@pytest.mark.parametrize("changed, message", (SHARED | POLICY).values(), ids=SHARED | POLICY)
def test_policy_loss_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        rl.policy_loss(**arguments(**changed))


def test_inplace_backward_refuses_leaves_and_expanded_logits():
    leaf = torch.randn(N, V, requires_grad=True)
    target, advantage = torch.arange(N), torch.ones(N)
    for logits, why in ((leaf, "leaf"), ((leaf[:1] * 1).expand(N, V), "expanded")):
        with pytest.raises(ValueError, match=f"inplace_backward.*{why}"):
            rl.token_logprob(logits, target, inplace_backward=True)
        with pytest.raises(ValueError, match=f"inplace_backward.*{why}"):
            rl.policy_loss(logits, target, advantage, inplace_backward=True)


def test_use_backend_refuses_unknown_names_and_ends_with_its_block():
    with pytest.raises(ValueError, match=r"'triton', 'torch'.*'cuda'"), rl.use_backend("cuda"):
        pass
    z, target = torch.randn(N, V), torch.arange(N)
    with rl.use_backend("torch"):
        inside = rl.token_logprob(z, target)
    assert torch.equal(inside.logp, rl.token_logprob(z, target, backend="torch").logp)
