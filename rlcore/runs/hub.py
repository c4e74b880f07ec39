"""A finished run's model on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from rlcore.errors import UserError, reason_of
from rlcore.runs.output_dir import CARD, COMPLETIONS_TABLE, CONFIG_FILE, PAGE
from rlcore.runs.run_record import read_record


def check_hub(repository: str) -> None:
    """Raise UserError where nothing can be pushed to `repository`: asked before anything trains."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"push_to_hub {repository!r} is no repository: {reason_of(error)}"
        ) from error
    try:
        HfApi().whoami()
    except Exception as error:
        # no token, one that is refused, no network: each has its own type
        raise UserError(
            f"push_to_hub {repository}: the hub does not know you ({reason_of(error)}); log in "
            "with `hf auth login`, set HF_TOKEN, or leave the option out"
        ) from error


def push(directory: str | Path, repository: str) -> str:
    """Put the model in a run's directory, its card and options on the hub; returns the address.

    Samples and metrics stay here: they may hold what the data's owner would not publish.

    Raises:
        UserError: it was not taken; the directory is as it was.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    record = read_record(directory)
    names = {CARD, CONFIG_FILE} | (record.written if record else set()) - {PAGE, COMPLETIONS_TABLE}
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        told = api.upload_folder(
            folder_path=directory,
            repo_id=repository,
            allow_patterns=sorted(name for name in names if (directory / name).is_file()),
            commit_message="A model trained with rlcore",
        )
    except Exception as error:
        raise UserError(
            f"the model is in {directory}, and could not be pushed to {repository}: "
            f"{reason_of(error)}; `hf upload {repository} {directory}` tries again"
        ) from error
    return str(getattr(told, "repo_url", None) or repository)
