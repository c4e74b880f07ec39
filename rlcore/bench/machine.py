"""What a measurement was made on: processor, GPU, driver, versions, commit, and how busy it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("rlcore", "torch", "triton", "transformers", "trl", "liger-kernel", "verl", "openrlhf")
PACKAGES += ("torchrl", "cut-cross-entropy", "quack-kernels", "flash-linear-attention")
_GPU_QUERY = "driver_version,clocks.max.sm,clocks.sm,clocks.mem,power.limit,temperature.gpu"


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit, as results carry them."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := version(name))},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "capability": f"{properties.major}.{properties.minor}",
        } | nvidia_smi()
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(device: torch.device) -> str:
    """The device's name for a file: nvidia-h200, amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if not head:
        return None
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return head + "+" * bool(changed)


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power limit and temperature as they are now; {} without the tool."""
    line = _output(["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"])
    if not line:
        return {}
    values = line.splitlines()[0].split(", ")
    return dict(zip(_GPU_QUERY.split(","), values, strict=False))


def load() -> float | None:
    """Other processes' share of the work here: the load average over a minute, a core being 1."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
