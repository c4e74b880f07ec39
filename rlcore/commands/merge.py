"""`rlcore merge`: an adapter added into the model it was trained on, as a whole model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlcore.data.ends import set_end_tokens
from rlcore.errors import UserError
from rlcore.models.adapters import ADAPTER_CONFIG, is_adapter, require_peft
from rlcore.models.loading import load_classifier, load_policy, load_tokenizer
from rlcore.runs.checked import Checked
from rlcore.runs.checkpoint import save_model


@dataclass(kw_only=True)
class MergeConfig(Checked):
    """Options of merging."""

    adapter: str  # directory of the adapter, as a trainer with --peft wrote it
    output_dir: str  # a new directory for the whole model


def merge(config: MergeConfig) -> None:
    """Write the adapter's model with the adapter added into its weights, and its tokenizer.

    Raises:
        UserError: no adapter there, or an output directory that is not empty.
    """
    if not is_adapter(config.adapter):
        raise UserError(f"adapter {config.adapter!r} has no {ADAPTER_CONFIG}: nothing to merge")
    require_peft()
    directory = Path(config.output_dir)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"output_dir {directory} exists and is not empty: choose another")
    task = json.loads((Path(config.adapter) / ADAPTER_CONFIG).read_text())["task_type"]
    load = load_classifier if task == "SEQ_CLS" else load_policy
    model, tokenizer = load(config.adapter), load_tokenizer(config.adapter)
    set_end_tokens(model, tokenizer)
    save_model(model, tokenizer, directory)
    print(f"the whole model is in {directory}")
