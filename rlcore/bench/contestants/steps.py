"""Whole optimizer steps of GRPO trainers, ours and TRL's, on the same model and completions.

Generation is left out: the completions are given. A step is forward, loss, backward, clipping of
the gradient, AdamW, and the metrics that the trainer logs. The gradient of each is held to the
loss written in plain PyTorch in float64 before the clock starts.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcore.bench import memory, timing
from rlcore.bench.cases import Case
from rlcore.bench.checking import TOLERANCES, Squares
from rlcore.bench.operations import clipped_loss, token_logp
from rlcore.bench.results.results import Row
from rlcore.trainers.shared.experience import Experience

PROMPT_LENGTH, GROUP, LAYERS = 16, 4, 2


@dataclass(frozen=True)
class Step:
    """How a trainer does it: `gradient` leaves the loss's in the parameters, `run` does a step."""

    model: Any
    gradient: Callable[[], object]
    run: Callable[[], object]


def measure(
    case: Case, wanted: set[str], device: torch.device, rounds: int, seconds: float
) -> list[Row]:
    """The rows of one case; tokens a second are those of the completions that count."""
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        directory = write_model(Path(folder) / "model", case)
        experience = make_experience(case, device)
        truth = exact_gradient(directory, experience, device)
        for name, make in CONTESTANTS.items():
            if wanted and name not in wanted:
                continue
            row, step = _check(case, name, make, directory, experience, truth, device)
            rows.append(row)
            if step is not None:
                steps[name] = step
        times = _times(steps, device, rounds, seconds)
    tokens = int(experience.mask.sum())
    return [_with(row, times, steps, tokens, device) for row in rows]


def _check(case, name, make, directory, experience, truth, device) -> tuple[Row, Step | None]:
    tolerance = TOLERANCES[case.dtype]
    try:
        step = make(directory, experience, case, device)
        step.gradient()
        error = gradient_error(step.model, truth)
    except ModuleNotFoundError as missing:
        return Row(case.key, name, "absent", f"needs {missing.name}"), None
    except Exception as raised:
        note = f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
        return Row(case.key, name, "failed", note), None
    status = "ok" if error <= tolerance else "wrong"
    return Row(case.key, name, status, error=error, tolerance=tolerance), step


def _times(steps, device, rounds, seconds) -> dict[str, timing.Times]:
    calls = {name: step.run for name, step in steps.items()}
    if device.type == "cuda":
        return {name: timing.on_gpu(call) for name, call in calls.items()}
    return timing.interleaved(calls, rounds, seconds)


def _with(row: Row, times, steps, tokens: int, device) -> Row:
    if row.contestant not in times:
        return row
    taken = times[row.contestant]
    peak = memory.on_gpu(steps[row.contestant].run) if device.type == "cuda" else None
    values = vars(row) | {"seconds": taken.median, "low": taken.low, "high": taken.high}
    values |= {"samples": taken.samples, "peak_bytes": peak}
    return Row(**values | {"more": {"tokens/s": round(tokens / taken.median)}})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the trainers' remarks on options that do not matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def write_model(directory: Path, case: Case) -> str:
    """A Qwen2 of LAYERS layers with random weights and the embedded task's tokenizer."""
    import transformers

    from rlcore.demo.arithmetic import make_tokenizer
    from rlcore.models.pretrained import no_progress_bars

    tokenizer = make_tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=case.V, hidden_size=case.H, intermediate_size=2 * case.H,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=PROMPT_LENGTH + case.T, tie_word_embeddings=False,
        initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), no_progress_bars():
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config).to(getattr(torch, case.dtype))
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return str(directory)


def make_experience(case: Case, device: torch.device) -> Experience:
    """B completions of up to T random tokens, a quarter of them shorter, with advantages."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, case.V, (case.B, PROMPT_LENGTH + case.T), generator=generator)
    lengths = torch.randint(case.T // 2, case.T + 1, (case.B,), generator=generator)
    lengths[::GROUP] = case.T
    mask = torch.arange(case.T) < lengths[:, None]
    attended = torch.cat([torch.ones(case.B, PROMPT_LENGTH, dtype=torch.bool), mask], 1).long()
    advantage = torch.randn(case.B, generator=generator)
    parts = (tokens, attended, mask, advantage)
    return Experience(*(part.to(device) for part in parts))


def exact_gradient(directory: str, experience: Experience, device: torch.device) -> list[Tensor]:
    """The gradient of every parameter in float64, a row of the batch at a time."""
    model = _load(directory, device).double()
    inputs = {"num_items": experience.mask.sum()}
    for row in range(len(experience)):
        one = experience.take(torch.tensor([row], device=device))
        logits = model(one.input_ids, attention_mask=one.attention_mask).logits
        logits = logits[0, -one.completion_length - 1 : -1]
        logp = token_logp(logits, one.target[0])
        inputs |= {"mask": one.mask[0], "advantage": one.advantage, "old_logp": logp.detach()}
        clipped_loss(inputs, logp).backward()
    return [p.grad for p in model.parameters()]


def gradient_error(model: Any, truth: list[Tensor]) -> float:
    """The RMS error of all gradients together over the truth's RMS."""
    squares = Squares()
    for parameter, exact in zip(model.parameters(), truth, strict=True):
        squares.add(parameter.grad, exact)
    return squares.ratio


def _load(directory: str, device: torch.device) -> Any:
    import transformers

    from rlcore.models.pretrained import no_progress_bars

    with no_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", trust_remote_code=False
        )
    return model.to(device).eval()


def rlcore_step(directory: str, experience: Experience, case: Case, device) -> Step:
    """What `rlcore train grpo` does with a generation batch."""
    from rlcore.models.heads import choose_head
    from rlcore.models.loading import load_tokenizer
    from rlcore.trainers import grpo
    from rlcore.trainers.shared.run import Run, make_accelerator, make_optimizer

    config = grpo.GRPOConfig(
        model=directory, dataset="unused", output_dir=f"{directory}/run", loss_type="bnpo",
        per_device_train_batch_size=case.B, num_generations=GROUP, reward=["exact_match"],
        max_completion_length=case.T, max_steps=1_000_000, learning_rate=1e-9,
    )  # fmt: skip
    accelerator = make_accelerator(config)
    model = _load(directory, device)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    head, _ = choose_head(model, True)
    run = Run(
        config, accelerator, model, optimizer, load_tokenizer(directory), config.max_steps,
        head=head,
    )  # fmt: skip
    rows = torch.arange(len(experience), device=device)

    def gradient() -> None:
        optimizer.zero_grad()
        grpo.surrogate_loss(run, experience, float(experience.mask.sum())).loss.backward()

    return Step(model, gradient, lambda: grpo.update_policy(run, 1, copy.copy(experience), rows))


def trl_step(directory: str, experience: Experience, case: Case, device) -> Step:
    """What TRL's GRPOTrainer does between two generations: loss, backward, clip, AdamW."""
    import datasets
    import trl

    config = trl.GRPOConfig(
        output_dir=f"{directory}/trl", loss_type="bnpo", beta=0.0, report_to=[], bf16=False,
        per_device_train_batch_size=case.B, num_generations=GROUP, learning_rate=1e-9,
        max_completion_length=case.T, use_cpu=device.type == "cpu", disable_tqdm=True,
        gradient_checkpointing=False, max_steps=1_000_000,
    )  # fmt: skip
    from rlcore.models.loading import load_tokenizer

    trainer = trl.GRPOTrainer(
        _load(directory, device), lambda completions, **_: [0.0] * len(completions), config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1"] * case.B}),
        processing_class=load_tokenizer(directory),
    )  # fmt: skip
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    width = PROMPT_LENGTH
    inputs = {
        "prompt_ids": experience.input_ids[:, :width],
        "prompt_mask": experience.attention_mask[:, :width],
        "completion_ids": experience.input_ids[:, width:],
        "completion_mask": experience.mask.long(),
        "advantages": experience.advantage,
        "num_items_in_batch": experience.mask.sum(),
    }

    def gradient() -> None:
        optimizer.zero_grad()
        trainer.accelerator.backward(trainer.compute_loss(model, dict(inputs)))

    def run() -> None:
        gradient()
        trainer.accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()

    return Step(model, gradient, run)


CONTESTANTS: dict[str, Callable[..., Step]] = {"rlcore step": rlcore_step, "trl step": trl_step}
