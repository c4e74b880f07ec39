"""Whether a run that is resumed is still the same run: its options, its models and its data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlcore.data.names import parts_of
from rlcore.errors import UserError
from rlcore.models.adapters import base_of_adapter, is_adapter
from rlcore.runs import fingerprints
from rlcore.runs.config import load_config, plain_value
from rlcore.runs.output_dir import CONFIG_FILE, file_of_run
from rlcore.runs.run_record import RECORD_FILE, read_record

_NAMED = re.compile(r"([\w.-]+)=(.+)")  # NAME=DATASET
MODELS = ("model", "ref_model", "teacher", "reward_model", "value_model")
INPUTS = (*MODELS, "dataset", "eval_dataset")  # options that name what a run reads
# how a run was started, not what it is: training.yaml holds neither
START_OPTIONS = ("resume", "overwrite_output_dir")
# what no step depends on but through how many there are
_MAY_CHANGE = (
    *("max_steps", "num_train_epochs", "logging_steps", "save_steps", "save_total_limit"),
    *(
        "eval_dataset",
        "eval_steps",
        "keep_best",
        "early_stopping_patience",
        "log_completions",
        "completions_format",
    ),
    *("per_device_eval_batch_size", "eval_num_generations"),
    *("sampler_url", "sampler_timeout", "sampler_requests", "sampler_weights_dir"),
    "sampler_tolerance",
    *("report_to", "run_name", "push_to_hub", "gradient_checkpointing"),
)
_NOT_COMPARED = (*START_OPTIONS, "output_dir")


def held_out_sets(eval_dataset: Any) -> dict[str, Any]:
    """{name: data set} of the option eval_dataset: a mapping, or words NAME=DATASET.

    Without names it is one set, be it of several parts, whose name is "".
    """
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, Mapping):
        return dict(eval_dataset)
    words = [eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
    if isinstance(words, list | tuple) and all(isinstance(word, str) for word in words):
        found = [_NAMED.fullmatch(word) for word in words if not Path(word).exists()]
        if words and len(found) == len(words) and all(found):
            return {match[1]: match[2] for match in found}
    return {"": eval_dataset}


def inputs_of(config: Any) -> dict[str, str]:
    """{option: path or name} of the models and data that the run reads, adapters' models too."""
    given: dict[str, str] = {}
    for name in INPUTS:
        value = getattr(config, name, None)
        if name == "eval_dataset":
            sets = held_out_sets(value)
            value = sets[""] if list(sets) == [""] else list(sets.values())
        if isinstance(value, list | tuple):
            parts = enumerate(value, start=1)
            given |= {f"{name} {number}": each for number, each in parts if isinstance(each, str)}
        elif isinstance(value, str):
            given[name] = value
    bases = {
        f"{name}'s own model": base_of_adapter(given[name])
        for name in MODELS
        if name in given and is_adapter(given[name])
    }
    return given | {name: base for name, base in bases.items() if base is not None}


def places_of(config: Any) -> dict[str, str]:
    """The same, of data sets the place alone, without what of it is wanted."""
    return {
        option: place if option.startswith(MODELS) else parts_of(place).place
        for option, place in inputs_of(config).items()
    }


def fingerprints_of(config: Any, rows: Iterable[Any]) -> dict[str, str]:
    """{option: fingerprint} of the data, and of the models that lie on this machine."""
    places = {name: Path(place) for name, place in inputs_of(config).items()}
    models = {
        name: fingerprints.of_model(place)
        for name, place in places.items()
        if name.startswith(MODELS) and place.is_dir()
    }
    return models | {"dataset": fingerprints.of_rows(rows)}


def check_same_options(config: Any) -> str | None:
    """What differs from the training.yaml of the run that `config` resumes, in one line.

    Raises:
        UserError: a difference after which the run would not go on as it would have.
    """
    path = file_of_run(config.output_dir, CONFIG_FILE)
    if path is None:
        return f"{config.output_dir} has no {CONFIG_FILE} to compare these options with"
    _check_trainer(config)
    before = load_config(type(config), path)
    changes = {
        field.name: f"{field.name} {_shown(before, field.name)} -> {_shown(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in _NOT_COMPARED and not _is_same(before, config, field.name)
    }
    # of the data only the rows count, which `check_same_inputs` compares once they are read
    fatal = [text for name, text in changes.items() if name not in (*_MAY_CHANGE, *_moved(config))]
    if fatal:
        raise UserError(
            f"{config.output_dir} cannot be resumed with other options than {path} holds: "
            f"{', '.join(fatal)}; give the old ones, or start a new run"
        )
    return f"resumed with {', '.join(changes.values())}" if changes else None


def check_same_inputs(config: Any, present: Mapping[str, str]) -> None:
    """Raise UserError where data or a model holds something else than when the run began."""
    before = _recorded(config)
    shown = {"dataset": _shown(config, "dataset")}  # of a mixture and of objects too
    for name, place in (inputs_of(config) | shown).items():
        if before.get(name, present.get(name)) != present.get(name):
            raise UserError(
                f"{config.output_dir} cannot be resumed: {name} {place} is not what the run began "
                "with; give that, or start a new run"
            )


def _check_trainer(config: Any) -> None:
    record = file_of_run(config.output_dir, RECORD_FILE)
    trainer = read_record(record.parent).trainer if record else ""
    if trainer and trainer != type(config).__name__:
        raise UserError(
            f"{config.output_dir} holds a run of another trainer ({trainer}, not "
            f"{type(config).__name__}): resume it with its own"
        )


def _recorded(config: Any) -> Mapping[str, str]:
    record = file_of_run(config.output_dir, RECORD_FILE)
    return read_record(record.parent).inputs if record else {}


def _moved(config: Any) -> set[str]:
    """Inputs whose content is compared, so that they may have another path."""
    on_disk = {name for name, place in inputs_of(config).items() if Path(place).is_dir()}
    return (on_disk | {"dataset"}) & _recorded(config).keys()


def _is_same(before: Any, config: Any, name: str) -> bool:
    # an object is told by its class alone; of data the rows are compared
    old, new = plain_value(getattr(before, name)), plain_value(getattr(config, name))
    if old == new or name not in INPUTS or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    return Path(old).exists() and Path(new).exists() and Path(old).samefile(new)


def _shown(config: Any, name: str) -> str:
    value = plain_value(getattr(config, name))
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
