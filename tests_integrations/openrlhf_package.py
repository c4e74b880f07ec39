"""Imports OpenRLHF's models without DeepSpeed and flash-attn, which need a GPU's compiler to build.

Its own tests do so too. The stand-ins go as soon as the import is done; nothing here calls them.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

STAND_INS = {
    "deepspeed": (),
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
}


def _stand_in(name: str, attributes: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for attribute in attributes:
        setattr(module, attribute, None)
    return module


_absent = [name for name in STAND_INS if name not in sys.modules]
for _name in _absent:
    sys.modules[_name] = _stand_in(_name, STAND_INS[_name])
import openrlhf.models as models  # noqa: E402, F401
import openrlhf.models.actor as actor  # noqa: E402, F401
import openrlhf.models.loss as loss  # noqa: E402, F401
import openrlhf.models.utils as utils  # noqa: E402, F401

for _name in _absent:
    del sys.modules[_name]
