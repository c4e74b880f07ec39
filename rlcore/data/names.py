"""How an option names a data set: PLACE, or PLACE:CONFIG/SPLIT of a directory or hub dataset."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_DATASET = re.compile(r"([^:]+):([^/:]*)(?:/([^/]+))?")


class DatasetName(NamedTuple):
    """A path or hub name, and what of it is wanted."""

    place: str
    config: str | None = None  # None: the only or the default one
    split: str | None = None  # None: by what it is for


def parts_of(name: str) -> DatasetName:
    """Read "openai/gsm8k:main/train"; either may be left out, as in "data:/test".

    A name that is a path as it stands is one.
    """
    found = None if Path(name).exists() else _DATASET.fullmatch(name)
    if found is None:
        return DatasetName(name)
    place, config, split = found.groups()
    return DatasetName(place, config or None, split)
