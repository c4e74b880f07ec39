"""What options are called elsewhere: names of TRL's that are taken as ours, and those answered."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rlcore.errors import nearest

ALIASES = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "reward_funcs": "reward",
    "reward_model_path": "reward_model",
    "reward_model_name_or_path": "reward_model",
    "sft_model_path": "model",
    "ref_model_name_or_path": "ref_model",
    "max_new_tokens": "max_completion_length",
    "response_length": "max_completion_length",
    "num_generations_eval": "eval_num_generations",
    "hub_model_id": "push_to_hub",
    "resume_from_checkpoint": "resume",
    "dataset_prompt_column": "prompt_column",
}
_SPLITS = "write it into the data set's name: --dataset NAME:CONFIG/SPLIT"
ANSWERS = {
    "dataset_config": _SPLITS,
    "dataset_train_split": _SPLITS,
    "dataset_test_split": "write it into the name: --eval-dataset NAME:CONFIG/SPLIT",
    "do_train": "`rlcore train` does",
    "do_eval": "give --eval-dataset",
    "eval_strategy": "an --eval-dataset is evaluated every --eval-steps and at the end",
    "evaluation_strategy": "an --eval-dataset is evaluated every --eval-steps and at the end",
    "save_strategy": "a checkpoint is written every --save-steps; 0: none",
    "logging_strategy": "metrics are written every --logging-steps",
    "load_best_model_at_end": "the best model is kept in output_dir/best: see --keep-best",
    "metric_for_best_model": "say --keep-best METRIC",
    "use_peft": "say --peft lora",
    "use_vllm": "completions are sampled in this process",
    "use_liger_kernel": "the losses are fused: see --fused-head",
    "use_liger_loss": "the losses are fused: see --fused-head",
    "fp16": "say --bf16",
    "overwrite_hub_repo": "a push adds a commit",
    "optim": "the optimizer is AdamW",
    "disable_tqdm": "where stderr is no terminal the screen is plain lines",
    "remove_unused_columns": "columns that nothing reads are left out; rewards get all others",
}


def our_name(name: str, known: Collection[str]) -> str:
    """Our name of an option that is called otherwise elsewhere; any other name as it is."""
    return ALIASES[name] if name not in known and ALIASES.get(name) in known else name


def unknown_option(
    name: str, known: Collection[str], show: Callable[[str], str] = repr, otherwise: str = ""
) -> str:
    """What to say behind a name that is no option: its meaning elsewhere, the nearest of ours."""
    if our_name(name, known) in known:
        return f": it is called {show(ALIASES[name])} here"
    if name in ANSWERS:
        return f": {ANSWERS[name]}"
    guess = nearest(name, known)
    return f"; did you mean {show(guess)}?" if guess else otherwise
