"""`rlcore env`: versions, devices and settings, as a block to paste into a report of a fault."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass

import torch

import rlcore
from rlcore.bench import machine
from rlcore.kernels.backend import resolve_backend
from rlcore.runs.checked import Checked

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "safetensors",
    "peft", "tyro", "rich", "trl", "verl", "openrlhf", "liger-kernel", "vllm", "deepspeed",
    "bitsandbytes", "flash-attn", "wandb", "tensorboard",
)  # fmt: skip
# what changes how the library or its neighbours compute
VARIABLES = ("RLCORE_", "TRITON_", "ACCELERATE_", "OMP_", "CUDA_", "HIP_", "ATEN_", "WORLD_SIZE")


@dataclass(kw_only=True)
class EnvConfig(Checked):
    """Environment."""


def env(config: EnvConfig) -> None:
    """Print the block."""
    lines = {
        "rlcore": rlcore.__version__,
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{machine.cpu_name()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "gpu": _gpus(),
        "backend": _backend(),
    }
    versions = {name: machine.version(name) for name in PACKAGES}
    lines |= {name: version for name, version in versions.items() if version}
    missing = [name for name, version in versions.items() if not version]
    lines["not installed"] = ", ".join(missing)
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            lines[name] = value
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))


def _backend() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return f"{resolve_backend(None, torch.zeros(0, device=device))} for tensors on {device}"
    except ValueError as error:
        return str(error)


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} ({toolkit})"
