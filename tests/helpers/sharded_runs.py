"""Run by each of two gloo processes: whole runs with FSDP2, and what they leave.

python sharded_runs.py DIRECTORY; every rank writes there that it came to the end.

accelerate takes FSDP for GPUs alone; `let_fsdp_in` gives it the processes of a CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import state
from accelerate.utils import DistributedType

from helpers.uneven_shares import SAMPLING, options_of
from rlcore.trainers import (
    DPOConfig,
    GRPOConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    train_dpo,
    train_grpo,
    train_ppo,
    train_reward_model,
    train_sft,
)

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def let_fsdp_in() -> None:
    """Have accelerate's state say FSDP where it would say several CPUs."""
    os.environ |= FSDP2
    original = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            shared = state.PartialState._shared_state
            shared |= {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}
            self.device = shared["device"]

    state.AcceleratorState.__init__ = init


def every_run(directory: Path) -> None:
    """Each trainer once, with as many held-out rows as one process has batches more of."""

    def options(name: str, **changes: Any) -> dict[str, Any]:
        return options_of(directory, f"{name}-sharded", 3, **changes)

    train_sft(SFTConfig(**options("sft")))
    train_sft(SFTConfig(**options("lora", peft="lora", lora_r=2)))
    train_dpo(DPOConfig(**options("dpo")))
    train_reward_model(RewardModelConfig(**options("reward_model")))
    train_grpo(GRPOConfig(**options("grpo", gradient_accumulation_steps=2, **SAMPLING)))
    train_ppo(PPOConfig(**options("ppo", gradient_accumulation_steps=2, **SAMPLING)))


def main() -> None:
    directory = Path(sys.argv[1])
    let_fsdp_in()
    every_run(directory)
    torch.save(True, directory / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    sys.stderr.flush()
    # every run is over and saved; a thread of torch's has aborted a process that ended otherwise
    os._exit(0)


if __name__ == "__main__":
    main()
