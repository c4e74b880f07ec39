"""Two-step arithmetic word problems with shown working: the task that needs no download.

    prompt       Ben has 9 pears, gets 8 more and finds 8. How many pears?
    completion    9+8=17, 17+8=25

The demonstrators are imperfect on purpose: they often stop after the first step, more often where
the second step subtracts. A model that imitates them greedily is therefore right about half the
time, at every seed, and reinforcement has something real to find: finish the working.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcore.demo.tiny_model import train_tokenizer, write_model

if TYPE_CHECKING:
    from rlcore.trainers.dpo import DPOConfig
    from rlcore.trainers.grpo import GRPOConfig
    from rlcore.trainers.pg import PGConfig
    from rlcore.trainers.ppo import PPOConfig
    from rlcore.trainers.reward_model import RewardModelConfig
    from rlcore.trainers.sft import SFTConfig
    from rlcore.trainers.trpo import TRPOConfig

NAMES = ("Ben", "Ana", "Tom", "Eva", "Max", "Lea", "Sam", "Ida")
THINGS = ("pears", "coins", "cards", "books", "stones", "shells", "apples", "stamps")
FIRST = {"+": "gets {} more", "-": "gives {} away"}
SECOND = {"+": ("finds {}", "buys {}", "wins {}"), "-": ("loses {}", "sells {}", "drops {}")}
# How often a demonstrator shows the full working, by the sign of the second step.
SHOWS_FULL_WORKING = {"+": 0.70, "-": 0.35}
HELD_OUT_SHARE = 0.15
MAX_PROMPT_LENGTH = 32
MAX_COMPLETION_LENGTH = 18

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class TaskPaths:
    """Where `make_task` wrote things: a model directory and three JSONL files."""

    model: Path
    sft: Path
    train: Path
    test: Path


def task_paths(directory: str | Path) -> TaskPaths:
    """Where in `directory` things stand once `make_task` has written them."""
    directory = Path(directory)
    return TaskPaths(
        model=directory / "model",
        sft=directory / "sft.jsonl",
        train=directory / "train.jsonl",
        test=directory / "test.jsonl",
    )


def triples() -> list[Triple]:
    """Every (start, first change, second change) of the task."""
    return [(a, b, c) for a in range(3, 10) for b in range(2, 10) for c in range(2, 10)]


def split_triples(seed: int) -> tuple[list[Triple], list[Triple]]:
    """(training triples, held-out triples): disjoint, so that no held-out sum was ever shown."""
    shuffled_triples = triples()
    random.Random(f"triples-{seed}").shuffle(shuffled_triples)
    held_out = int(len(shuffled_triples) * HELD_OUT_SHARE)
    return shuffled_triples[held_out:], shuffled_triples[:held_out]


def make_problem(rng: random.Random, numbers: Sequence[Triple]) -> dict[str, str]:
    """One problem: its prompt, the gold first step, the full gold working and the answer."""
    # Signs are drawn once: drawing them again with the numbers would make subtraction rare.
    first_sign, second_sign = rng.choice("+-"), rng.choice("+-")
    while True:
        start, first, second = rng.choice(numbers)
        middle = start + first if first_sign == "+" else start - first
        answer = middle + second if second_sign == "+" else middle - second
        if middle >= 0 and answer >= 0:
            break
    story = f"{FIRST[first_sign]} and {rng.choice(SECOND[second_sign])}".format(first, second)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    step = f" {start}{first_sign}{first}={middle}"
    return {
        "prompt": f"{name} has {start} {thing}, {story}. How many {thing}?",
        "first_step": step,
        "working": f"{step}, {middle}{second_sign}{second}={answer}",
        "answer": str(answer),
        "second_sign": second_sign,
    }


def demonstrate(rng: random.Random, problem: dict[str, str]) -> dict[str, str]:
    """A demonstrator's {"prompt", "completion"}: the full working, or only its first step."""
    full = rng.random() < SHOWS_FULL_WORKING[problem["second_sign"]]
    return {
        "prompt": problem["prompt"],
        "completion": problem["working"] if full else problem["first_step"],
    }


def make_task(
    directory: str | Path,
    seed: int = 0,
    *,
    sft_rows: int = 32_000,
    train_rows: int = 4_096,
    test_rows: int = 512,
) -> TaskPaths:
    """Write the task into `directory`: data, tokenizer and a model with random weights.

    What comes out is ordinary (JSONL files, a transformers model directory), so that the trainers
    and their loading code run on it as on anybody's data. The same seed writes the same files.
    """
    paths = task_paths(directory)
    Path(directory).mkdir(parents=True, exist_ok=True)
    seen, held_out = split_triples(seed)
    rng = random.Random(f"problems-{seed}")
    demonstrations = [demonstrate(rng, make_problem(rng, seen)) for _ in range(sft_rows)]
    _write_jsonl(paths.sft, demonstrations)
    for path, numbers, count in (
        (paths.train, seen, train_rows),
        (paths.test, held_out, test_rows),
    ):
        problems = [make_problem(rng, numbers) for _ in range(count)]
        columns = ("prompt", "answer", "first_step")
        _write_jsonl(path, [{name: row[name] for name in columns} for row in problems])
    write_model(paths.model, make_tokenizer(), seed)
    return paths


@dataclass(frozen=True)
class PairPaths:
    """Where `make_pairs` wrote preference pairs: two JSONL files."""

    train: Path
    test: Path  # of held-out problems


def pair_paths(directory: str | Path) -> PairPaths:
    """Where in `directory` the pairs stand once `make_pairs` has written them."""
    return PairPaths(Path(directory) / "train.jsonl", Path(directory) / "test.jsonl")


def make_pairs(
    paths: TaskPaths,
    model: str | Path,
    directory: str | Path,
    seed: int = 0,
    *,
    prompts: int = 640,
    num_generations: int = 8,
) -> PairPaths:
    """Preference pairs of what the model in `model` samples, right answers before wrong ones.

    Args:
        prompts: training problems; of the held-out ones a quarter as many.
        num_generations: completions a problem; each right one meets a wrong one of the problem's.
    """
    from rlcore.models.loading import load_reference, load_tokenizer

    policy, tokenizer = load_reference(str(model)), load_tokenizer(str(model))
    Path(directory).mkdir(parents=True, exist_ok=True)
    written = pair_paths(directory)
    for number, (source, out, count) in enumerate(
        ((paths.train, written.train, prompts), (paths.test, written.test, prompts // 4))
    ):
        lines = source.read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        _write_jsonl(out, _pairs(policy, tokenizer, rows, num_generations, 2 * seed + number))
    return written


def _pairs(
    policy: Any, tokenizer: Any, rows: list[dict[str, str]], num_generations: int, seed: int
) -> Iterator[dict[str, str]]:
    from rlcore.sampling.rollout import generate

    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        sampled = generate(
            policy,
            tokenizer,
            [row["prompt"] for row in batch],
            num_generations=num_generations,
            max_new_tokens=MAX_COMPLETION_LENGTH,
            seed=1_000_003 * seed + start,
        ).completions
        for place, row in enumerate(batch):
            own = sampled[place * num_generations : (place + 1) * num_generations]
            right = [text for text in own if stated_answer(text) == row["answer"]]
            wrong = [text for text in own if stated_answer(text) != row["answer"]]
            for chosen, rejected in zip(right, wrong, strict=False):
                yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer() -> Any:
    """The task's tokenizer, trained on its own words: the same at every seed."""
    rng = random.Random("tokenizer")
    corpus = [make_problem(rng, triples()) for _ in range(2_000)]
    return train_tokenizer(row["prompt"] + row["working"] for row in corpus)


def stated_answer(completion: str) -> str | None:
    """The number after the last `=`, None where there is none or something follows it."""
    found = re.search(r"=\s*(-?\d+)\s*$", completion)
    return found.group(1) if found else None


def correct(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The verifier: 1.0 where the number after the last `=` is the answer, else 0.0."""
    return [
        float(stated_answer(completion) == gold)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def shuffled(
    prompts: list[str], completions: list[str], answer: list[str], **_: Any
) -> list[float]:
    """The control: the verifier's own rewards, dealt out to the batch's completions at random.

    The distribution of rewards stays, what they reward goes: a run that improves on them would
    improve for another reason. The deal depends on the completions alone, so a run repeats.
    """
    rewards = correct(prompts, completions, answer)
    random.Random(zlib.crc32("\n".join(completions).encode())).shuffle(rewards)
    return rewards


def accuracy(
    model: Any,
    tokenizer: Any,
    rows: Iterable[dict[str, str]],
    greedy: bool = True,
    *,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """The share of `rows` ({"prompt", "answer"}) that the model answers correctly."""
    from rlcore.sampling.rollout import generate

    rows = list(rows)
    right = 0.0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [row["prompt"] for row in batch]
        rollout = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=MAX_COMPLETION_LENGTH,
            greedy=greedy,
            seed=seed + start,
        )
        right += sum(correct(prompts, rollout.completions, [row["answer"] for row in batch]))
    return right / len(rows)


def with_first_step(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with the gold first step given: finishing the working gets this far, no further."""
    return [{**row, "prompt": f"{row['prompt']}{row['first_step']},"} for row in rows]


def sft_config(paths: TaskPaths, output_dir: str | Path, seed: int = 0) -> SFTConfig:
    """What the demo's warm start runs with; recipes/arithmetic_sft.yaml says the same."""
    from rlcore.trainers.sft import SFTConfig

    return SFTConfig(
        model=str(paths.model),
        dataset=str(paths.sft),
        output_dir=str(output_dir),
        seed=seed,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_steps=1200,
        learning_rate=2e-3,
        adam_beta2=0.98,
        warmup_steps=20,
        lr_scheduler_type="warmup_stable_decay",
        lr_decay_ratio=0.4,
        logging_steps=10,
        max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
    )


def _sampling(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int
) -> dict[str, Any]:
    """What every run that samples and is judged by the verifier has in common."""
    return {
        "model": str(model),
        "dataset": str(paths.train),
        "output_dir": str(output_dir),
        "eval_dataset": str(paths.test),
        "reward": ["arithmetic"],
        "seed": seed,
        "per_device_train_batch_size": 512,
        "num_generations": 8,
        "max_prompt_length": MAX_PROMPT_LENGTH,
        "max_completion_length": MAX_COMPLETION_LENGTH,
    }


def grpo_config(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> GRPOConfig:
    """What the demo's GRPO runs with, from the warm start in `model`."""
    from rlcore.trainers.grpo import GRPOConfig

    return GRPOConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=4,
        num_iterations=2,
        max_steps=20,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        lr_min_ratio=0.1,
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        temperature=1.0,
    )


def pg_config(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> PGConfig:
    """The policy gradient with a leave-one-out baseline, from the warm start in `model`."""
    from rlcore.trainers.pg import PGConfig

    return PGConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=2,
        baseline="leave_one_out",
        max_steps=10,
        learning_rate=1e-3,
        lr_min_ratio=0.1,
    )


def trpo_config(
    paths: TaskPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> TRPOConfig:
    """TRPO with a group's mean for a baseline, from the warm start in `model`."""
    from rlcore.trainers.trpo import TRPOConfig

    return TRPOConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=2,
        max_steps=10,
        lr_min_ratio=0.1,
        fisher_rows=128,
    )


def ppo_config(
    paths: TaskPaths,
    model: str | Path,
    output_dir: str | Path,
    seed: int = 0,
    kl_mode: str = "clip",
) -> PPOConfig:
    """PPO of either kind, from the warm start in `model`."""
    from rlcore.trainers.ppo import PPOConfig

    return PPOConfig(
        **_sampling(paths, model, output_dir, seed),
        eval_steps=2,
        kl_mode=kl_mode,
        num_ppo_epochs=4,
        max_steps=10,
        learning_rate=3e-4,
        lr_min_ratio=0.1,
        value_learning_rate=1e-3,
        value_warmup_steps=1,
        cliprange_value=None,
        kl_coef=0.0,
    )


def reward_model_config(
    pairs: PairPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> RewardModelConfig:
    """What the demo's reward model learns with, from the warm start in `model`."""
    from rlcore.trainers.reward_model import RewardModelConfig

    return RewardModelConfig(
        model=str(model),
        dataset=str(pairs.train),
        output_dir=str(output_dir),
        eval_dataset=str(pairs.test),
        seed=seed,
        per_device_train_batch_size=32,
        num_train_epochs=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        lr_min_ratio=0.1,
        max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
    )


def grpo_reward_model_config(
    paths: TaskPaths,
    model: str | Path,
    reward_model: str | Path,
    output_dir: str | Path,
    seed: int = 0,
) -> GRPOConfig:
    """`grpo_config` with the reward model as judge, held close to the reference by a KL term."""
    return dataclasses.replace(
        grpo_config(paths, model, output_dir, seed),
        reward=[],
        reward_model=str(reward_model),
        learning_rate=3e-4,
        beta=0.1,
        scale_rewards="batch",
    )


def ppo_reward_model_config(
    paths: TaskPaths,
    model: str | Path,
    reward_model: str | Path,
    output_dir: str | Path,
    seed: int = 0,
) -> PPOConfig:
    """`ppo_config` with the reward model as judge, the KL to the reference off the rewards."""
    return dataclasses.replace(
        ppo_config(paths, model, output_dir, seed),
        reward=[],
        reward_model=str(reward_model),
        normalize_rewards=True,
        kl_coef=0.05,
    )


def dpo_config(
    pairs: PairPaths, model: str | Path, output_dir: str | Path, seed: int = 0
) -> DPOConfig:
    """What the demo's DPO runs with: one epoch of what the warm start in `model` sampled."""
    from rlcore.trainers.dpo import DPOConfig

    return DPOConfig(
        model=str(model),
        dataset=str(pairs.train),
        output_dir=str(output_dir),
        eval_dataset=str(pairs.test),
        seed=seed,
        per_device_train_batch_size=32,
        num_train_epochs=1.0,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        lr_min_ratio=0.1,
        beta=0.1,
        precompute_ref_log_probs=True,
        max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
    )
