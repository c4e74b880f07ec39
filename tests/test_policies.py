"""Which model is asked as the reference: another, the start, or the policy without its adapter."""

from __future__ import annotations

import pytest
import torch
from helpers import grpo as make
from helpers.tiny import save_tiny, tiny_model, tiny_tokenizer

from rlcore.errors import UserError
from rlcore.models.adapters import add_lora
from rlcore.trainers.shared.policies import (
    Policy,
    as_reference,
    completion_logp,
    load_wanted_reference,
)


def adapted(seed: int):
    """A policy that has moved away from its start."""
    model = tiny_model(seed=seed)
    add_lora(model, r=2, alpha=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    return model


def reference_logp(config, model) -> torch.Tensor:
    """(N, C): what the run's reference thinks of the completions."""
    run = make.make_run(config, model)
    reference = as_reference(run, load_wanted_reference(config, tiny_tokenizer()))
    return completion_logp(run, reference, make.experience())


def own_logp(config, model) -> torch.Tensor:
    run = make.make_run(config, model)
    return completion_logp(run, Policy(run.model, run.head), make.experience())


@pytest.mark.parametrize("peft", [None, "lora"])
@pytest.mark.parametrize("named", [True, False], ids=["ref_model", "no ref_model"])
def test_the_reference_is_the_model_named_or_the_start(tmp_path, peft, named):
    start, other = (save_tiny(tmp_path / f"model{seed}", seed=seed) for seed in (1, 2))
    config = make.config(
        tmp_path, model=start, beta=0.1, peft=peft, ref_model=other if named else None
    )
    policy = adapted(1) if peft else tiny_model(seed=3)
    want = own_logp(config, tiny_model(seed=2 if named else 1))
    torch.testing.assert_close(reference_logp(config, policy), want, rtol=1e-5, atol=1e-5)
    # an adapter's own start needs no second model
    held = load_wanted_reference(config, tiny_tokenizer())
    assert (held is None) == (peft == "lora" and not named)


def test_without_a_term_that_asks_for_one_there_is_no_reference(tmp_path):
    config = make.config(tmp_path, model=save_tiny(tmp_path / "model"), beta=0.0)
    assert load_wanted_reference(config, tiny_tokenizer()) is None
    assert as_reference(make.make_run(config), None) is None


def test_a_reference_that_reads_other_tokens_is_refused(tmp_path):
    path = save_tiny(tmp_path / "model")
    other = type(tiny_tokenizer()).from_pretrained(path)
    other.add_tokens(["pineapple"])
    config = make.config(tmp_path, model=path, ref_model=path, beta=0.1)
    with pytest.raises(UserError, match=r"ref_model '.*model' has another tokenizer"):
        load_wanted_reference(config, other)
