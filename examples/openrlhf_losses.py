"""OpenRLHF's actor and losses on a tiny model, as they are and served by rlcore.

    python examples/openrlhf_losses.py

Offline and on a CPU; OpenRLHF must import, with its DeepSpeed and flash-attn.
"""

import torch
from openrlhf.models import Actor, DPOLoss, PairWiseLoss, PolicyLoss, ValueLoss
from transformers import LlamaConfig, LlamaForCausalLM

from rlcore.integrations import openrlhf as rl_openrlhf

ROWS, PROMPT, ANSWER, VOCABULARY, STEPS = 4, 5, 7, 256, 10


def make_actor() -> Actor:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    actor = Actor(LlamaForCausalLM(config))
    actor.packing_samples = False
    return actor


def train() -> list[float]:
    """The losses of some PPO steps of the actor."""
    actor = make_actor()
    tokens = torch.randint(VOCABULARY, (ROWS, PROMPT + ANSWER))
    attention, action_mask = torch.ones_like(tokens), torch.ones(ROWS, ANSWER)
    advantages = torch.randn(ROWS, 1).expand(ROWS, ANSWER)
    policy_loss = PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3)
    losses, old = [], None
    for _ in range(STEPS):
        logp = actor(tokens, action_mask, attention_mask=attention)
        old = logp.detach() if old is None else old
        loss = policy_loss(logp, old, advantages, action_mask)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def other_losses() -> dict[str, float]:
    torch.manual_seed(1)
    one, two, three, four = torch.randn(4, 6)
    mask = torch.ones(6)
    return {
        "ValueLoss": ValueLoss(clip_eps=0.2)(one, two, three, mask).item(),
        "PairWiseLoss": PairWiseLoss()(one, two).item(),
        "DPOLoss": DPOLoss(beta=0.1)(one, two, three, four)[0].item(),
        "DPOLoss, IPO": DPOLoss(beta=0.1, ipo=True)(one, two, three, four)[0].item(),
    }


def main() -> None:
    theirs, others = train(), other_losses()
    with rl_openrlhf.patch():
        ours, our_others = train(), other_losses()
    difference = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"PPO over {STEPS} steps: loss {ours[0]:+.4f} -> {ours[-1]:+.4f}, largest difference "
          f"{difference:.1e}")  # fmt: skip
    for name, value in our_others.items():
        print(f"{name}: {value:.6f}, difference {abs(value - others[name]):.1e}")


if __name__ == "__main__":
    main()
