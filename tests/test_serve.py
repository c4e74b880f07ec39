"""`rlcore serve`: what vLLM is started with, and on which files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from helpers.tiny import save_tiny

from rlcore.cli import main
from rlcore.commands.serve import ServeConfig, serve
from rlcore.errors import UserError

# notes its words, its environment and the configuration of what it is to serve
PROGRAM = """#!{python}
import json, os, sys
words = sys.argv[1:]
config = json.load(open(os.path.join(words[1], "config.json")))
files = sorted(os.listdir(words[1]))
told = dict(words=words, dev=os.environ.get("VLLM_SERVER_DEV_MODE"), config=config, files=files)
json.dump(told, open({out!r}, "w"))
sys.exit(3)
"""


def served(directory: Path, model: str, *flags: str) -> dict:
    """What a program in the place of vLLM was started with by the command line."""
    program, out = directory / "vllm", directory / "told.json"
    program.write_text(PROGRAM.format(python=sys.executable, out=str(out)))
    program.chmod(0o755)
    assert main(["serve", model, "--vllm", str(program), *flags]) == 3  # its own exit status
    return json.loads(out.read_text())


def test_vllm_is_started_with_what_the_sampler_needs(tmp_path):
    model = save_tiny(tmp_path / "model")
    more = tmp_path / "more.yaml"
    more.write_text("enforce-eager: true")
    told = served(tmp_path, model, "--port", "8123", "--vllm-config", str(more))
    assert told["words"][:2] == ["serve", model]
    words = " ".join(told["words"])
    for flag in (
        "--port 8123",
        "--dtype float32",
        "--logprobs-mode processed_logprobs",
        "--enable-scale-out",
        f"--config {more}",
    ):
        assert flag in words
    assert told["dev"] == "1"


def test_a_model_with_a_tied_head_is_served_untied_from_a_copy_that_goes_with_the_server(tmp_path):
    told = served(tmp_path, save_tiny(tmp_path / "model", tie_word_embeddings=True))
    assert told["config"]["tie_word_embeddings"] is False
    assert {"head.safetensors", "body.safetensors", "tokenizer.json"} <= set(told["files"])
    assert not os.path.exists(told["words"][1])


def test_without_vllm_one_is_told_what_to_install(tmp_path):
    with pytest.raises(UserError, match="no command 'no-such-vllm': install vLLM"):
        serve(ServeConfig(model="unused", vllm="no-such-vllm"))


def test_the_options_of_serving_are_checked():
    with pytest.raises(UserError, match="port must be"):
        serve(ServeConfig(model="unused", port=0))
    with pytest.raises(UserError, match="vllm_config missing is no file"):
        serve(ServeConfig(model="unused", vllm_config="missing"))
    with pytest.raises(UserError, match="Did you mean 'float16'"):
        serve(ServeConfig(model="unused", dtype="float61"))
