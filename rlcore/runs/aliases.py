"""What options are called elsewhere: names of TRL's that are taken as ours, and those answered.

Those of FOLDED and PARAMETERS become a part of an option of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from rlcore.errors import UserError, nearest

ALIASES = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "reward_funcs": "reward",
    "reward_model_path": "reward_model",
    "reward_model_name_or_path": "reward_model",
    "sft_model_path": "model",
    "ref_model_name_or_path": "ref_model",
    "teacher_model_name_or_path": "teacher",
    "max_new_tokens": "max_completion_length",
    "response_length": "max_completion_length",
    "num_generations_eval": "eval_num_generations",
    "hub_model_id": "push_to_hub",
    "resume_from_checkpoint": "resume",
    "dataset_prompt_column": "prompt_column",
    "datasets": "dataset",
    "dataset_streaming": "streaming",
    "activation_checkpointing": "gradient_checkpointing",
    "num_completions_to_print": "log_completions",
    "max_seq_length": "max_length",
    "rloo_k": "num_generations",
    "vllm_importance_sampling_mode": "importance_sampling_correction",
    "vllm_importance_sampling_cap": "importance_sampling_clip_max",
    "vllm_importance_sampling_clip_max": "importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min": "importance_sampling_clip_min",
    "vllm_server_base_url": "sampler_url",
    "vllm_server_timeout": "sampler_timeout",
}
_READ_FIRST = "data is tokenized before the first step"
_LAUNCHER = "`accelerate config` and `accelerate launch` say how models are sharded"
_REFERENCE = "the reference stays what it is: see --ref-model"
FOLDED = {"dataset_config": str, "dataset_train_split": str, "use_peft": bool}
# names of TRL's for surrogates' own parameters: entries of surrogate_params
PARAMETERS = {
    "sapo_temperature_pos": "tau_pos",
    "sapo_temperature_neg": "tau_neg",
    "vespo_k_pos": "k_pos",
    "vespo_lambda_pos": "lambda_pos",
    "vespo_k_neg": "k_neg",
    "vespo_lambda_neg": "lambda_neg",
}
# options of ours that not every trainer has
OF_OTHERS = {
    "streaming": "sft has it; elsewhere data is read whole, as any row may come next",
    "num_iterations": "grpo has it; ppo has num_ppo_epochs, and pg goes through a batch once",
    "epsilon": "grpo has it; ppo has cliprange, and pg has nothing to clip",
}
ANSWERS = {
    "dataset_test_split": "write it into the name: --eval-dataset NAME:CONFIG/SPLIT",
    "dataset_streaming": "sft has --streaming; elsewhere data is read whole",
    "normalize_advantages": "see whiten_advantages, over the batch's tokens",
    "eval_on_start": "an eval_dataset is evaluated at the start too",
    "do_train": "`rlcore train` does",
    "do_eval": "give --eval-dataset",
    "eval_strategy": "an --eval-dataset is evaluated every --eval-steps and at the end",
    "evaluation_strategy": "an --eval-dataset is evaluated every --eval-steps and at the end",
    "save_strategy": "a checkpoint is written every --save-steps; 0: none",
    "logging_strategy": "metrics are written every --logging-steps",
    "load_best_model_at_end": "the best model is kept in output_dir/best: see --keep-best",
    "metric_for_best_model": "say --keep-best METRIC",
    "use_vllm": "say --sampler vllm --sampler-url http://HOST:PORT",
    "use_liger_kernel": "the losses are fused: see --fused-head",
    "use_liger_loss": "the losses are fused: see --fused-head",
    "fp16": "say --bf16",
    "overwrite_hub_repo": "a push adds a commit",
    "optim": "the optimizer is AdamW",
    "disable_tqdm": "where stderr is no terminal the screen is plain lines",
    "remove_unused_columns": "columns that nothing reads are left out; rewards get all others",
    "activation_checkpointing_kwargs": "see --gradient-checkpointing, which is not reentrant",
    "gradient_checkpointing_kwargs": "see --gradient-checkpointing, which is not reentrant",
    "adam_epsilon": "AdamW's is 1e-8",
    "completion_only_loss": "the loss is on the completion alone where a row has one",
    "data_seed": "the order of the data follows --seed",
    "dataloader_num_workers": _READ_FIRST,
    "dataset_num_proc": _READ_FIRST,
    "dataset_text_field": "a row's text is in its column 'text'",
    "deepspeed": _LAUNCHER,
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "disable_dropout": "dropout is off wherever policies are compared",
    "activation_offloading": "--gradient-checkpointing makes activations again instead",
    "load_in_8bit": "say --load-in-4bit",
    "bnb_4bit_quant_type": "--load-in-4bit takes nf4",
    "use_bnb_nested_quant": "--load-in-4bit quantizes the blocks' scales too",
    "packing": "say --padding-free: a micro-step's sequences are then one row",
    "pad_to_multiple_of": "a batch is as wide as its longest row",
    "precompute_ref_batch_size": "it is per_device_train_batch_size",
    "train_sampling_strategy": "rows are drawn in an order of --seed, always",
    "eval_delay": "an eval_dataset is evaluated from the start on: see --eval-steps",
    "generation_batch_size": "it is per_device_train_batch_size x steps_per_generation a process",
    "hub_token": "`hf auth login` keeps it",
    "logging_first_step": "metrics are written every --logging-steps",
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "sync_ref_model": _REFERENCE,
    "shuffle_dataset": "rows are drawn in an order of --seed, always",
    "use_bias_correction_kl": "say --kl-estimator k3_ratio",
    "repetition_penalty": "sampling has none; the reward of that name counts repeated n-grams",
    "use_cache": "sampling has a cache, and training needs none",
    "use_cpu": "`accelerate launch --cpu` does",
}


def folded(known: Collection[str]) -> dict[str, type]:
    """{name: type} of the options that `fold` makes a part of one of `known`."""
    has_both = "dataset" in known and "peft" in known
    of_data = {name: kind for name, kind in FOLDED.items() if has_both and name not in known}
    return of_data | dict.fromkeys(PARAMETERS if "surrogate_params" in known else (), float)


def fold(values: dict[str, Any]) -> dict[str, Any]:
    """The options with those of FOLDED as parts of ours.

    Raises:
        UserError: a configuration or split without the name of one data set.
    """
    parts = {name: values.pop(name) for name in FOLDED if name in values}
    own = {PARAMETERS[name]: values.pop(name) for name in PARAMETERS if name in values}
    if own:
        values["surrogate_params"] = (values.get("surrogate_params") or {}) | own
    if parts.get("use_peft"):
        values.setdefault("peft", "lora")
    config, split = parts.get("dataset_config"), parts.get("dataset_train_split")
    if config or split:
        name = values.get("dataset")
        if not isinstance(name, str) or ":" in name:
            raise UserError(
                "dataset_config and dataset_train_split are parts of one data set's name: give "
                "dataset NAME:CONFIG/SPLIT, for each of several"
            )
        values["dataset"] = _joined(name, config, split)
    return values


def mixture(value: Any) -> Any:
    """TRL's YAML of several data sets, [{path, name, split}, ...], as their names here."""
    if not isinstance(value, list) or not any(isinstance(each, Mapping) for each in value):
        return value
    return [_of_mixture(each) if isinstance(each, Mapping) else each for each in value]


def _of_mixture(entry: Mapping[str, Any]) -> str:
    unknown = sorted(map(str, entry.keys() - {"path", "name", "split"}))
    if unknown or not entry.get("path"):
        raise UserError(
            "a data set of several is NAME:CONFIG/SPLIT, or path with name and split, without "
            f"{', '.join(unknown) or 'leaving out path'}: not {dict(entry)!r:.120}"
        )
    return _joined(str(entry["path"]), entry.get("name"), entry.get("split"))


def _joined(place: str, config: str | None, split: str | None) -> str:
    rest = f"{config or ''}{f'/{split}' if split else ''}"
    return f"{place}:{rest}" if rest else place


def our_name(name: str, known: Collection[str]) -> str:
    """Our name of an option that is called otherwise elsewhere; any other name as it is."""
    return ALIASES[name] if name not in known and ALIASES.get(name) in known else name


def unknown_option(
    name: str, known: Collection[str], show: Callable[[str], str] = repr, otherwise: str = ""
) -> str:
    """What to say behind a name that is no option: its meaning elsewhere, the nearest of ours."""
    if our_name(name, known) in known:
        return f": it is called {show(ALIASES[name])} here"
    if name in FOLDED:
        return f": see {show('peft' if name == 'use_peft' else 'dataset')}"
    if name in PARAMETERS:
        return ": grpo has it"
    answers = ANSWERS | OF_OTHERS
    if name in answers or name.startswith("vllm_"):
        return f": {answers.get(name, ANSWERS['use_vllm'])}"
    guess = nearest(name, known)
    return f"; did you mean {show(guess)}?" if guess else otherwise
