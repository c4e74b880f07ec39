"""The options of everything that judges completions."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlcore.runs.checked import Checked


@dataclass(kw_only=True)
class RewardConfig(Checked):
    """Reward."""

    # package.module:function or path/to/file.py:function of your own, or arithmetic, code_runs,
    # exact_match, math_verify, regex_match, think_format
    reward: list[str] = field(default_factory=list)
    code_sandbox: str | None = None  # package.module:function that runs code_runs' programs
    reward_model: str | None = None  # a trained reward model; may stand beside other rewards
    reward_weights: list[float] | None = None  # one a reward, the model's last; None: 1 each
