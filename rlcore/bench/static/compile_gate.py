"""Compiles kernels for every target without a GPU and reads what came out.

`python -m rlcore.bench.static.compile_gate MODULE ...` prints it as JSON. A module under
TRITON_INTERPRET has no compilable kernels, so `compiled()` runs this file in a process of its own.
A kernel module offers `compile_specs()`, which yields dicts with the keys name, fn, signature,
constexprs, options, and optionally attrs (argument name -> divisibility).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from rlcore.bench.static import sass

OURS = "rlcore.bench.static.specs"
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)


def compile_kernel(spec: dict, target: str) -> dict:
    """Compiles one spec for one target and reads registers, spills and widths from the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec["fn"].arg_names
    attrs = spec.get("attrs") or {}
    attrs = {
        (names.index(key),) if isinstance(key, str) else key: value for key, value in attrs.items()
    }
    source = ASTSource(spec["fn"], spec["signature"], spec["constexprs"], attrs)
    options, warp = dict(spec["options"]), TARGETS[target][2]
    if "THREADS" in spec["constexprs"]:
        options["num_warps"] = max(spec["constexprs"]["THREADS"] // warp, 1)
    started = time.perf_counter()
    kernel = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    return {"seconds": round(time.perf_counter() - started, 2), **read(kernel)}


def read(kernel: Any) -> dict:
    """What a compiled kernel takes: registers, spills, shared memory, instructions, loops."""
    if "cubin" in kernel.asm:
        found = sass.read_cubin(kernel.asm["cubin"])
    else:
        found = sass.read_amdgcn(kernel.asm["amdgcn"])
    warps = kernel.metadata.num_warps
    return found | {"shared": kernel.metadata.shared, "threads": warps * 32}


def main(*modules: str) -> None:
    results, seen = [], {}
    for module in map(importlib.import_module, modules):
        for spec in module.compile_specs():
            for target in TARGETS:
                # Vocabularies that choose the same tile share one compiled kernel.
                parts = ("signature", "constexprs", "attrs", "options")
                key = repr((spec["fn"].__name__, target, *map(spec.get, parts)))
                if key not in seen:
                    seen[key] = compile_kernel(spec, target)
                results.append({"name": spec["name"], "target": target, **seen[key]})
    print(json.dumps(results))


@functools.cache
def compiled(modules: Sequence[str] = (OURS,)) -> list[dict]:
    """What every kernel compiled to: a list of dicts with `name`, `target` and what was read.

    Raises RuntimeError with the compiler's last words where one does not compile.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "rlcore.bench.static.compile_gate", *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the compile gate failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
