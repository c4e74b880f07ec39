"""Whether a checkpoint's weights are all there and are numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlcore.errors import UserError
from rlcore.functional.finite import first_not_finite
from rlcore.models.adapters import NEW_HEAD


@dataclass(frozen=True)
class Fit:
    """How a checkpoint's weights and a model's fit each other."""

    missing: dict[str, str]  # drawn at random; why, where the checkpoint has one that does not fit
    unused: set[str]  # in the checkpoint alone


def fit_of(info: dict[str, Any]) -> Fit:
    """transformers' loading info in our words."""
    shapes = {
        name: f"{tuple(theirs)}, not {tuple(ours)}"
        for name, theirs, ours in info["mismatched_keys"]
    }
    return Fit(dict.fromkeys(info["missing_keys"], "") | shapes, set(info["unexpected_keys"]))


def check_finite(model: Any, name_or_path: str) -> None:
    """Raise UserError where a weight is NaN or infinite: nothing could be trained from there."""
    found = first_not_finite(model.named_parameters())
    if found is not None:
        raise UserError(
            f"{name_or_path!r} holds a broken model: its weight {found[0]} has a {found[1]}"
        )


def is_new_head(name: str) -> bool:
    """Whether a weight is that of the layer which a classifier adds to its backbone."""
    return name.split(".")[0] == NEW_HEAD


def check_whole(model: Any, name_or_path: str, missing: dict[str, str]) -> None:
    """Raise UserError where weights would be those that were drawn just now."""
    if not missing:
        return
    names = [f"{name} ({why})" if why else name for name, why in sorted(missing.items())]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UserError(
        f"{name_or_path!r} does not hold all weights of a {type(model).__name__}: it lacks "
        f"{', '.join(names[:3])}{rest}, which would be random; choose a checkpoint that has them"
    )
