"""`rlcore serve`: a vLLM server that `--sampler vllm` can sample from, with the right options."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from rlcore.errors import UserError, unknown_name
from rlcore.models.adapters import is_adapter
from rlcore.models.loading import load_policy, load_tokenizer
from rlcore.runs.checked import Checked
from rlcore.runs.ranges import Count, Range
from rlcore.sampling.served_weights import is_tied, write_served

DTYPES = ("float32", "bfloat16", "float16", "auto")
# what a server needs that is to be given new weights, and to say which tokens it drew how
FLAGS = (
    *("--served-model-name", "policy"),
    # of the distribution that was drawn from: tempered and truncated
    *("--logprobs-mode", "processed_logprobs"),
    # no sampling options of the model's own
    *("--generation-config", "vllm"),
    # the route that takes and gives token ids
    "--enable-scale-out",
)
# on a CPU vLLM 0.32 ends where the prompt of a request with a seed is cut into chunks
CPU_FLAGS = ("--no-enable-chunked-prefill",)
# the routes that take new weights
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


@dataclass(kw_only=True)
class ServeConfig(Checked):
    """Serving."""

    model: str  # directory or hub name of the model that is to be trained, or an adapter's
    # who reaches the server can give it other weights: leave it on this machine, or in a closed net
    host: str = "127.0.0.1"
    port: Annotated[int, Range(1, 65535)] = 8000
    dtype: str = "float32"  # of the server's weights: float32, bfloat16, float16 or auto
    max_model_len: Count | None = None  # tokens of prompt and completion; None: the model's own
    trust_remote_code: bool = False  # run Python that comes with a model of the hub
    vllm: str = "vllm"  # the command vllm; give its path where it is in another environment
    vllm_config: str | None = (
        None  # a YAML file of further options, as `vllm serve --config` has it
    )


def serve(config: ServeConfig) -> int:
    """Serve the model until a signal ends it; returns the server's exit status.

    Raises:
        UserError: options, no vLLM, or a model that does not load.
    """
    if config.dtype not in DTYPES:
        raise unknown_name("dtype", config.dtype, DTYPES)
    if config.vllm_config is not None and not Path(config.vllm_config).is_file():
        raise UserError(f"vllm_config {config.vllm_config} is no file: name a YAML file")
    program = _program(config.vllm)
    with _served(config) as directory:
        words = [program, "serve", directory, "--host", config.host, "--port", str(config.port)]
        words += ["--dtype", config.dtype, *FLAGS]
        if not torch.cuda.is_available():
            words += CPU_FLAGS
        if config.max_model_len is not None:
            words += ["--max-model-len", str(config.max_model_len)]
        if config.trust_remote_code:
            words.append("--trust-remote-code")
        if config.vllm_config is not None:
            words += ["--config", config.vllm_config]
        print(shlex.join(words), flush=True)
        print(
            f"sample from it with --sampler vllm --sampler-url http://{config.host}:{config.port}"
        )
        return _run(words, os.environ | ENVIRONMENT)


def _program(name: str) -> str:
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is None:
        raise UserError(
            f"there is no command {name!r}: install vLLM in an environment of its own (`python -m "
            "venv vllm`, `vllm/bin/pip install vllm`) and give its path, --vllm vllm/bin/vllm"
        )
    return found


@contextlib.contextmanager
def _served(config: ServeConfig) -> Iterator[str]:
    """A directory or name that vLLM can serve and bring new weights to, while this is open."""
    model = load_policy(config.model, dtype="auto", trust_remote_code=config.trust_remote_code)
    if not (is_tied(model) or is_adapter(config.model)):
        del model
        yield config.model
        return
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="rlcore-serve-") as directory:
        write_served(model, tokenizer, Path(directory))
        del model
        yield directory


def _run(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """The program's exit status; signals that this process gets go on to it."""
    process = subprocess.Popen(words, env=environment)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(each, lambda number, _: process.send_signal(number)) for each in numbers
    ]
    try:
        status = process.wait()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
