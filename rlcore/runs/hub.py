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
    api = HfApi()
    try:
        who = api.whoami()
    except Exception as error:
        said = _why_unknown(error, api.endpoint)
        raise UserError(f"push_to_hub {repository}: {said}") from error
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(
            f"push_to_hub {repository}: your token of the hub may only read; make one that may "
            "write and log in with it, or leave the option out"
        )


def _why_unknown(error: Exception, endpoint: str) -> str:
    """Why the hub did not say who asks, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if isinstance(error, LocalTokenNotFoundError):
        return (
            "there is no token of the hub on this machine; log in with `hf auth login`, set "
            "HF_TOKEN, or leave the option out"
        )
    if not isinstance(error, HfHubHTTPError):
        return (
            f"the hub at {endpoint} is not reached ({reason_of(error)}); see whether this machine "
            "is online, or leave the option out and push the finished model later"
        )
    status = error.response.status_code
    first_line, _, _ = str(error).strip().partition("\n")  # the others are the library's links
    reason = f"{status}: {first_line}"
    if status in (401, 403):
        return (
            f"the hub refuses your token ({reason}); log in anew with `hf auth login`, set "
            "HF_TOKEN to a token that may write, or leave the option out"
        )
    return f"the hub answers with an error ({reason}); try again later, or leave the option out"


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
