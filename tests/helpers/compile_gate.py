"""Compiles every kernel for every target without a GPU and prints what came out, as JSON.

A module under `TRITON_INTERPRET` has no compilable kernels, so `compiled()` runs this file in a
process of its own. A kernel module offers `compile_specs()`, which yields dicts with the keys
name, fn, signature, constexprs, options, and optionally attrs (argument name -> divisibility).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import time

MODULES = ("rlcore.kernels.specs", "helpers.canaries")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
TARGETS["gfx942"] = ("hip", "gfx942", 64)


def compile_kernel(spec: dict, target: str) -> dict:
    """Compiles one spec for one target and reads registers, spills and widths from the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from helpers import sass

    names = spec["fn"].arg_names
    attrs = spec.get("attrs") or {}
    attrs = {
        (names.index(key),) if isinstance(key, str) else key: value for key, value in attrs.items()
    }
    source = ASTSource(spec["fn"], spec["signature"], spec["constexprs"], attrs)
    started = time.perf_counter()
    kernel = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=spec["options"])
    is_nvidia = "cubin" in kernel.asm
    if is_nvidia:
        read = sass.read_cubin(kernel.asm["cubin"])
    else:
        read = sass.read_amdgcn(kernel.asm["amdgcn"])
    return {"seconds": round(time.perf_counter() - started, 2), **read}


def main() -> None:
    results, seen = [], {}
    for module in map(importlib.import_module, MODULES):
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
def compiled() -> list[dict]:
    """What every kernel compiled to: a list of dicts with `name`, `target` and what was read."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "helpers.compile_gate"]
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(tests), tests])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests)
    assert done.returncode == 0, f"the compile gate failed:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
