"""A run that samples from its policy and has that judged: what surrounds a trainer's own lines.

online = prepare_online(config, reward_funcs, given, check_pg_config)
with online.started("PG", DISPLAYED):
    for step in online.run.steps():
        sampled = online.sample(step - 1)
        ...
        online.log(step, sampled.metrics, trained)
        online.save(step)
    return online.finish()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
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

Measure = Callable[[Any], Mapping[str, float]]  # a held-out set -> its metrics


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
    clock: Clock = field(init=False)
    _log: Log = field(init=False)
    _held: HeldOut = field(init=False)

    @contextlib.contextmanager
    def started(
        self, name: str, displayed: Sequence[str], measure: Measure | None = None
    ) -> Iterator[None]:
        """While the output directory is the run's; measures the start on held-out prompts.

        `measure` gives held-out prompts their metrics; None: their completions' rewards.
        """
        run = self.run
        measure = measure or (lambda some: evaluate(run, some, self.judge))
        with tracking(run, self.given, name, displayed) as tracker:
            self._log, self.clock = Log(run, tracker), Clock()
            self._held = HeldOut(run, self._log, self.clock, self.data.held_out, measure)
            yield

    def seed(self, number: int) -> int:
        """Of all that is random in generation batch `number`, from 0."""
        return mix_seed(self.run.config.seed, number)

    def chosen(self, number: int) -> Sequence[int]:
        """The rows of generation batch `number`, of all processes."""
        return batch_indices(len(self.data.train), self.prompts, number, self.run.config.seed)

    def sample(self, number: int) -> Sampled:
        """Generation batch `number`, from 0: a function of it, the seed and the policy alone."""
        return collect(
            self.run, self.data.train[self.chosen(number)], self.judge, self.seed(number)
        )

    def log(
        self, step: int, batch: MutableMapping[str, float], trained: Mapping[str, float]
    ) -> None:
        """Log a step, measure where it is time to; a batch's "tokens" count in its first step."""
        lap = self.clock.lap(batch.pop("tokens", 0))
        metrics = {**batch, **trained, **lap, "num_tokens": self.run.num_tokens}
        metrics["epoch"] = step / self.steps * self.prompts / len(self.data.train)
        self._log.add(step, metrics)
        self._held.after(step)

    def save(self, step: int) -> None:
        """A checkpoint where one is due; not within a batch, as a resumed run starts with one."""
        save_if_due(self.run, step, self.steps)

    def finish(self) -> Result:
        return finish_run(self.run, self._log, self.critic and self.critic.save)


def _wanted_reference(config: SamplingConfig, tokenizer: Any, policy: Any) -> Any | None:
    """The reference that the config asks for."""
    return load_wanted_reference(config, tokenizer)


def prepare_online(
    config: SamplingConfig,
    reward_funcs: RewardLike | Sequence[RewardLike] | None,
    given: Given,
    check: Callable[[Any, int], None],
    *,
    load: Callable[[Any, Any, Judge], Data] = load_prompts,
    critic: bool = False,
    frozen: Callable[[Any, Any, Any], Any] | None = _wanted_reference,
    prepare: Callable[[Run], None] | None = None,
) -> Online:
    """Refuses what can be refused before anything is written: options, data, models, rewards.

    Args:
        reward_funcs, given: what the trainer was given besides the config.
        check: (config, number of reward functions) -> raises UserError for options at odds.
        load: (config, tokenizer, judge) -> the run's data.
        critic: whether a value model is trained.
        frozen: (config, tokenizer, policy) -> the model in the reference's place; None: there is
            no such place.
        prepare: what to do to the run before its optimizers are made.
    """
    config = with_objects(config, given)
    judge = make_judge(config, reward_funcs)
    check(config, len(judge.functions))
    accelerator = make_accelerator(config)
    tokenizer = tokenizer_of(config, given)
    judge.prepare(tokenizer, accelerator.device)
    data = load(config, tokenizer, judge)
    model = policy_of(config, dropout=False)
    check_sampler(config, model)
    values = load_critic(config, model, tokenizer) if critic else None
    reference = frozen and frozen(config, tokenizer, model)
    data.check_models(tokenizer, model, values and values.model, reference)
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
    reference = as_reference(run, reference) if frozen else None
    return Online(run, judge, data, values, reference, given, prompts, config.steps_per_batch)
