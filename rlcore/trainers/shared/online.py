"""A run that samples from its policy and has that judged: what surrounds a trainer's own lines.

online = prepare_online(config, reward_funcs, given, check_pg_config)
with online.started("PG", DISPLAYED):
    for step in online.run.steps():
        sampled = online.sample(step - 1)
        ...
        online.log(step, sampled, trained)
        online.save(step)
    return online.finish()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcore.sampling.rewards import RewardLike
from rlcore.trainers.options.sampling import SamplingConfig
from rlcore.trainers.shared.collect import Sampled, collect
from rlcore.trainers.shared.critic import Critic, load_critic
from rlcore.trainers.shared.evaluation import evaluate
from rlcore.trainers.shared.given import Given, policy_of, tokenizer_of, with_objects
from rlcore.trainers.shared.held_out import HeldOut
from rlcore.trainers.shared.judging import Judge, make_judge
from rlcore.trainers.shared.loading import Data, load_prompts
from rlcore.trainers.shared.metrics import Clock, Log
from rlcore.trainers.shared.order import batch_indices, mix_seed
from rlcore.trainers.shared.policies import Policy, as_reference, load_wanted_reference
from rlcore.trainers.shared.run import Result, Run, make_accelerator, start_run, total_steps
from rlcore.trainers.shared.samplers import check_sampler, make_sampler
from rlcore.trainers.shared.writing import finish_run, save_if_due, tracking


@dataclass
class Online:
    """A run about to start, and what its steps need."""

    run: Run
    judge: Judge
    data: Data
    critic: Critic | None
    reference: Policy | None
    given: Given
    prompts: int  # of all processes, in a generation batch
    steps: int  # of the run, that it serves
    _log: Log = field(init=False)
    _clock: Clock = field(init=False)
    _held: HeldOut = field(init=False)

    @contextlib.contextmanager
    def started(self, name: str, displayed: Sequence[str]) -> Iterator[None]:
        """While the output directory is the run's; measures the start on held-out prompts."""
        run = self.run
        with tracking(run, self.given, name, displayed) as tracker:
            self._log, self._clock = Log(run, tracker), Clock()
            self._held = HeldOut(
                run, self._log, self._clock, self.data.held_out,
                lambda some: evaluate(run, some, self.judge),
            )  # fmt: skip
            yield

    def seed(self, number: int) -> int:
        """Of all that is random in generation batch `number`, from 0."""
        return mix_seed(self.run.config.seed, number)

    def sample(self, number: int) -> Sampled:
        """Generation batch `number`, from 0: a function of it, the seed and the policy alone."""
        rows = self.data.train
        chosen = rows[batch_indices(len(rows), self.prompts, number, self.run.config.seed)]
        return collect(self.run, chosen, self.judge, self.seed(number))

    def log(self, step: int, sampled: Sampled, trained: Mapping[str, float]) -> None:
        """Log a step, measure and save where it is time to.

        A batch's tokens count in its first step; it is saved after its last one alone, so that a
        resumed run starts with a fresh batch.
        """
        run, metrics = self.run, dict(sampled.metrics)
        tokens = metrics.pop("tokens")
        sampled.metrics["tokens"] = 0
        metrics |= {**trained, **self._clock.lap(tokens), "num_tokens": run.num_tokens}
        metrics["epoch"] = step / self.steps * self.prompts / len(self.data.train)
        self._log.add(step, metrics)
        self._held.after(step)

    def save(self, step: int) -> None:
        """A checkpoint after a generation batch, where one is due."""
        save_if_due(self.run, step, self.steps)

    def finish(self) -> Result:
        return finish_run(self.run, self._log, self.critic and self.critic.save)


def prepare_online(
    config: SamplingConfig,
    reward_funcs: RewardLike | Sequence[RewardLike] | None,
    given: Given,
    check: Callable[[Any, int], None],
    *,
    critic: bool = False,
    reference: bool = True,
    prepare: Callable[[Run], None] | None = None,
) -> Online:
    """Refuses what can be refused before anything is written: options, data, models, rewards.

    Args:
        reward_funcs, given: what the trainer was given besides the config.
        check: (config, number of reward functions) -> raises UserError for options at odds.
        critic: whether a value model is trained; reference: whether the config may ask for one.
        prepare: what to do to the run before its optimizers are made.
    """
    config = with_objects(config, given)
    judge = make_judge(config, reward_funcs)
    check(config, len(judge.functions))
    accelerator = make_accelerator(config)
    tokenizer = tokenizer_of(config, given)
    judge.prepare(tokenizer, accelerator.device)
    data = load_prompts(config, tokenizer, judge)
    model = policy_of(config, dropout=False)
    check_sampler(config, model)
    values = load_critic(config, model, tokenizer) if critic else None
    frozen = load_wanted_reference(config, tokenizer) if reference else None
    data.check_models(tokenizer, model, values and values.model, frozen)
    prompts = config.prompts_per_process * accelerator.num_processes
    total = total_steps(config, len(data.train), prompts / config.steps_per_batch)

    def prepared(run: Run) -> None:
        for each in (prepare, values and values.prepare):
            if each is not None:
                each(run)

    run = start_run(
        config, accelerator, model, tokenizer, total, prepared, data=data.train, notes=data.notes
    )
    run.sampler = make_sampler(run)
    policy = as_reference(run, frozen) if reference else None
    return Online(run, judge, data, values, policy, given, prompts, config.steps_per_batch)
