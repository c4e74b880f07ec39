"""Two-step arithmetic word problems with shown working: the task that needs no download.

    prompt       Ben has 9 pears, gets 8 more and finds 8. How many pears?
    completion    9+8=17, 17+8=25

The demonstrators are imperfect on purpose: they often stop after the first step, more often where
the second step subtracts. A model that imitates them greedily is therefore right about half the
time, at every seed, and reinforcement has something real to find: finish the working.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.demo.tiny_model import train_tokenizer, write_model

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
