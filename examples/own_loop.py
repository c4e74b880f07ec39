"""GRPO in a training loop of one's own, on the fused head of any causal language model.

    python examples/own_loop.py

Offline and on a CPU, in seconds; the model is tiny and random, and is rewarded for writing digits.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlcore as rl
from rlcore.demo.arithmetic import make_task

PROMPTS = ["Ben has 9 pears", "7", "Ana", "8 coins"]
STEPS, GROUP, LENGTH = 30, 8, 16


def share_of_digits(text: str) -> float:
    return sum(map(str.isdigit, text)) / max(len(text), 1)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = make_task(folder, sft_rows=1, train_rows=1, test_rows=1).model
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path)
    prompts = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    prompts = {name: value.repeat_interleave(GROUP, 0) for name, value in prompts.items()}
    width = prompts["input_ids"].shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    head = rl.fused_head(model)
    for step in range(STEPS):
        # what is sampled, and what of it counts: a completion up to its end
        input_ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=LENGTH)
        completion = input_ids[:, width:]
        ended = (completion == tokenizer.eos_token_id).cumsum(1)
        counts = ended - (completion == tokenizer.eos_token_id).long() == 0
        attention_mask = torch.cat([prompts["attention_mask"], counts.long()], 1)
        labels = input_ids.clone()
        labels[:, :width] = -100
        labels[:, width:][~counts] = -100

        texts = tokenizer.batch_decode(completion, skip_special_tokens=True)
        reward = torch.tensor([share_of_digits(text) for text in texts])
        advantage = rl.group_advantage(reward, GROUP)
        with torch.no_grad():
            old_logp = head(input_ids, attention_mask, labels=labels, entropy=False).logp

        for _ in range(2):
            out = head.policy_loss(
                input_ids, advantage, attention_mask, labels=labels, old_logp=old_logp
            )
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        if step % 5 == 4:
            entropy = out.entropy.sum() / counts.sum()
            print(f"step {step + 1:3}  reward {reward.mean():.3f}  entropy {entropy:.3f}")


if __name__ == "__main__":
    main()
