"""TRL's GRPOTrainer on rlcore's losses: the same curve as without, by one line.

    python examples/trl_grpo.py

Offline and on a CPU, in seconds; the model is tiny and random, and is rewarded for writing digits.
"""

import tempfile

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from rlcore.demo.arithmetic import make_task
from rlcore.integrations import trl as rl_trl

STEPS = 10


def share_of_digits(completions: list[str], **_) -> list[float]:
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in completions]


def train(model: str) -> list[dict]:
    """The log of STEPS optimizer steps."""
    config = GRPOConfig(
        output_dir=f"{model}/../trl", max_steps=STEPS, per_device_train_batch_size=16,
        num_generations=8, max_completion_length=16, learning_rate=1e-3, logging_steps=1,
        num_iterations=2, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, share_of_digits, config,
        train_dataset=Dataset.from_dict({"prompt": ["Ben has 9 pears", "7", "Ana", "8 coins"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_task(folder, sft_rows=1, train_rows=1, test_rows=1).model)
        plain = train(model)
        with rl_trl.patch():
            patched = train(model)
    print("step       loss    patched   entropy   patched")
    for step, (one, other) in enumerate(zip(plain, patched, strict=True), 1):
        numbers = one["loss"], other["loss"], one["entropy"], other["entropy"]
        print(f"{step:4} " + "".join(f"{number:10.6f}" for number in numbers))


if __name__ == "__main__":
    main()
