"""TRL's GRPO steps on rlcore's losses take at most 0.7 of the time and half the memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="pip install -e '.[integrations]'")

from trl_steps import peaks, seconds


def test_patched_steps_take_at_most_seven_tenths_of_the_time():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = seconds()
    torch.set_num_threads(before)
    print(f"\nseconds of ten steps: {taken}")
    assert taken["trl, patched"] <= 0.7 * taken["trl"]


def test_patched_steps_have_at_most_half_the_peak_memory():
    most = peaks()
    print(f"\npeak memory: {most}")
    for key in ("whole", "above"):
        assert most["trl, patched"][key] <= 0.5 * most["trl"][key]
