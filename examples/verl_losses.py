"""A policy's update in verl's own functions, with verl's losses and with rlcore's.

    python examples/verl_losses.py

Offline and on a CPU: hidden states and advantages are drawn, verl's fused head makes the
log-probabilities, verl's registry has the losses. The same updates follow from both.
"""

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.kernel import linear_cross_entropy as fused
from verl.workers.config import ActorConfig

from rlcore.integrations import verl as rl_verl

ROWS, LENGTH, HIDDEN, VOCABULARY, STEPS = 8, 16, 32, 512, 20


def train(loss_mode: str) -> list[float]:
    """The losses of some steps on the head's weight."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH))
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (ROWS, 1))
    advantages = torch.randn(ROWS, 1).expand(ROWS, LENGTH)
    weight = torch.nn.Parameter(0.1 * torch.randn(VOCABULARY, HIDDEN))
    optimizer = torch.optim.AdamW([weight], lr=6e-4)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    losses, old_logp = [], None
    for _ in range(STEPS):
        logp, _ = fused.linear_cross_entropy(hidden, weight, tokens, 0.9, "none")
        logp = logp.view(ROWS, LENGTH)
        old_logp = logp.detach() if old_logp is None else old_logp
        loss, metrics = get_policy_loss_fn(loss_mode)(
            old_log_prob=old_logp,
            log_prob=logp,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="seq-mean-token-mean",
            config=config,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{loss_mode:16} loss {losses[0]:+.4f} -> {losses[-1]:+.4f}, clipped tokens "
          f"{metrics.get('actor/pg_clipfrac', 0.0):.0%}")  # fmt: skip
    return losses


def main() -> None:
    rl_verl.register()  # from verl 0.9 on, verl has done so by itself
    with rl_verl.patch():  # verl's own head is a GPU kernel
        for verls, ours in (
            ("vanilla", "rlcore_ppo"), ("gspo", "rlcore_gspo"), ("cispo", "rlcore_cispo"),
            ("sapo", "rlcore_sapo"), ("geo_mean", "rlcore_geo_mean"),
        ):  # fmt: skip
            pairs = zip(train(verls), train(ours), strict=True)
            print(f"{'':16} largest difference {max(abs(a - b) for a, b in pairs):.1e}\n")


if __name__ == "__main__":
    main()
