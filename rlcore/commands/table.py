"""The table of commands: COMMANDS. What they are made of is imported when one runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Where a command's config class and function live, and what it does in one line."""

    module: str
    config: str
    function: str
    summary: str
    positional: tuple[str, ...] = ()  # fields that take the words before the first flag, in order


COMMANDS = {
    "train sft": Command(
        "rlcore.trainers.sft",
        "SFTConfig",
        "train_sft",
        "fine-tune on demonstrations: rows of prompt and completion",
    ),
    "train pg": Command(
        "rlcore.trainers.pg",
        "PGConfig",
        "train_pg",
        "policy gradient: REINFORCE, RLOO, REINFORCE++; rows of prompt, any other columns",
    ),
    "train rloo": Command(
        "rlcore.trainers.pg",
        "RLOOConfig",
        "train_pg",
        "pg with a prompt's other completions as baseline; rows of prompt, any other columns",
    ),
    "train trpo": Command(
        "rlcore.trainers.trpo",
        "TRPOConfig",
        "train_trpo",
        "natural gradient within a trust region; rows of prompt, any other columns",
    ),
    "train ppo": Command(
        "rlcore.trainers.ppo",
        "PPOConfig",
        "train_ppo",
        "PPO with a value model, clipped or with a KL penalty; rows of prompt, any other columns",
    ),
    "train grpo": Command(
        "rlcore.trainers.grpo",
        "GRPOConfig",
        "train_grpo",
        "reinforce what a reward function likes: rows of prompt, any other columns",
    ),
    "train reward_model": Command(
        "rlcore.trainers.reward_model",
        "RewardModelConfig",
        "train_reward_model",
        "learn from preferences what is better: rows of prompt, chosen, rejected",
    ),
    "train dpo": Command(
        "rlcore.trainers.dpo",
        "DPOConfig",
        "train_dpo",
        "prefer the better of two answers: rows of prompt, chosen, rejected",
    ),
    "train kto": Command(
        "rlcore.trainers.kto",
        "KTOConfig",
        "train_kto",
        "learn from completions that are good or bad: rows of prompt, completion, label",
    ),
    "train distill": Command(
        "rlcore.trainers.distill",
        "DistillConfig",
        "train_distill",
        "learn a teacher's probabilities, on what the student samples: rows of prompt, completion",
    ),
    "eval": Command(
        "rlcore.commands.evaluate",
        "EvalConfig",
        "evaluate_models",
        "score models on held-out prompts: greedy, mean@k, pass@k with intervals, a row a model",
        positional=("model",),
    ),
    "chat": Command(
        "rlcore.commands.chat",
        "ChatConfig",
        "chat",
        "talk to a model, or have it complete texts, with the score of each answer",
        positional=("model",),
    ),
    "compare": Command(
        "rlcore.commands.compare",
        "CompareConfig",
        "compare",
        "runs beside each other: options that differ, held-out values, curves",
        positional=("runs",),
    ),
    "report": Command(
        "rlcore.commands.report",
        "RunReportConfig",
        "report",
        "runs as one page of HTML: curves, samples, options, warnings",
        positional=("runs",),
    ),
    "serve": Command(
        "rlcore.commands.serve",
        "ServeConfig",
        "serve",
        "start a vLLM server that trainers can sample from: --sampler vllm",
        positional=("model",),
    ),
    "env": Command(
        "rlcore.commands.env",
        "EnvConfig",
        "env",
        "versions, devices and settings, to paste into a report of a fault",
    ),
    "merge": Command(
        "rlcore.commands.merge",
        "MergeConfig",
        "merge",
        "add an adapter into the model it was trained on",
    ),
    "demo": Command(
        "rlcore.demo.demo",
        "DemoConfig",
        "demo",
        "train a small model on made-up word problems, here and now, with nothing to download",
    ),
    "bench": Command(
        "rlcore.bench.run",
        "BenchConfig",
        "bench",
        "time every operation, ours and every installed peer's, beside what the machine can do",
        positional=("cases",),
    ),
    "bench report": Command(
        "rlcore.bench.results.report",
        "ReportConfig",
        "report",
        "results of `rlcore bench` as Markdown, plots and one HTML page",
        positional=("results",),
    ),
    "bench compare": Command(
        "rlcore.bench.results.compare",
        "CompareConfig",
        "compare",
        "what got slower, larger or wrong between two results; exit status 1 where something did",
        positional=("before", "after"),
    ),
    "bench static": Command(
        "rlcore.bench.static.static",
        "StaticConfig",
        "static",
        "registers, spills, load widths, bytes and recompilations of the kernels, with no GPU",
    ),
    "doctor": Command(
        "rlcore.bench.doctor",
        "DoctorConfig",
        "doctor",
        "what hardware serves here, known-bad versions, and a check of every kernel in seconds",
    ),
}

OTHER_NAMES = {
    "train reward": "train reward_model",
    **{f"train {loss}": f"train dpo --loss-type {loss}" for loss in ("orpo", "cpo", "simpo")},
    "train online_dpo": "train dpo --online",
    "train gkd": "train distill",
    "vllm-serve": "serve",
}
