"""A policy as a directory that an inference server loads: whole, merged, its head untied.

A server that shares one tensor between embedding and head may load the embedding alone when it
gets new weights, and go on with the old head; so the head is always there by its own name.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlcore.models.adapters import has_adapter, merge_adapter
from rlcore.models.pretrained import no_progress_bars

HEAD_FILE = "head.safetensors"
BODY_FILE = "body.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def write_served(
    policy: Any,
    tokenizer: Any,
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the policy into a new directory; an adapter is merged into a copy of it.

    `weights` are its whole ones, where it holds only shards of them itself. `tokenizer` None
    writes none.
    """
    if has_adapter(policy):
        policy = merge_adapter(copy.deepcopy(policy))
    with no_progress_bars():
        policy.save_pretrained(directory, state_dict=weights, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if is_tied(policy):
        _untie(policy, directory, weights)


def is_tied(policy: Any) -> bool:
    """Whether the head's weight is the embedding's."""
    head = policy.get_output_embeddings()
    return head is not None and head.weight is policy.get_input_embeddings().weight


def _untie(policy: Any, directory: Path, weights: dict[str, torch.Tensor] | None) -> None:
    head = policy.get_output_embeddings()
    name = next(name for name, module in policy.named_modules() if module is head) + ".weight"
    weight = head.weight if weights is None else weights[name]
    save_file(
        {name: weight.detach().cpu().contiguous().clone()},
        directory / HEAD_FILE,
        metadata={"format": "pt"},
    )
    index = directory / INDEX_FILE
    if not index.is_file():
        # readers look for a file of this name before they look for an index
        (directory / "model.safetensors").rename(directory / BODY_FILE)
        with safe_open(directory / BODY_FILE, "pt") as body:
            files = dict.fromkeys(body.keys(), BODY_FILE)
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    listed = json.loads(index.read_text())
    listed["weight_map"][name] = HEAD_FILE
    index.write_text(json.dumps(listed, indent=2))
    config = directory / "config.json"
    options = json.loads(config.read_text())
    options["tie_word_embeddings"] = False
    if isinstance(options.get("text_config"), dict):
        options["text_config"]["tie_word_embeddings"] = False
    config.write_text(json.dumps(options, indent=2))
