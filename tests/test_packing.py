"""Padding-free passes: the same numbers and gradients as padded rows, and no row sees another."""

from dataclasses import dataclass

import pytest
import torch
from helpers.tiny import tiny_model

from rlcore.errors import UserError
from rlcore.models.heads import LogitsHead, choose_head, without_padding
from rlcore.models.packing import pack, packed_outputs

KINDS = ["qwen2", "llama", "gpt2", "gemma2"]


@dataclass
class Rows:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor

    @property
    def target(self):
        return self.input_ids[:, -self.mask.shape[1] :]


def padded_rows():
    """Three rows of 6 + 5 tokens with padding on both sides, one of them without any."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 300, (3, 11), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :4] = attention_mask[0, -2:] = attention_mask[2, :1] = 0
    return Rows(ids, attention_mask, attention_mask[:, -5:].bool())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_packed_rows_give_the_padded_rows_loss_and_gradients(kind, fused):
    model, batch = tiny_model(kind), padded_rows()
    head, note = choose_head(model, fused)
    assert note is None
    results = {}
    for each in (head, without_padding(head, model)):
        model.zero_grad()
        advantage = torch.tensor([1.0, -0.5, 2.0])
        result = each.policy_loss(model, batch, advantage, surrogate="reinforce")
        result.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results[each.padding_free] = (result.loss, result.logp, gradients)
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_does_not_see_its_neighbours(kind):
    model, batch = tiny_model(kind), padded_rows()
    head = LogitsHead(padding_free=True)
    logp = head.token_logprob(model, batch, entropy=False).logp
    batch.input_ids[0] = batch.input_ids[0].flip(0)
    others = head.token_logprob(model, batch, entropy=False).logp
    torch.testing.assert_close(others[1:], logp[1:])
    assert (others[0] - logp[0]).abs().max() > 1e-3


def test_a_packed_row_has_every_token_that_predicts_one_and_no_padding():
    batch = padded_rows()
    packed = pack(batch.input_ids, batch.attention_mask, 5)
    assert packed.input_ids.shape == (1, int(batch.attention_mask.sum()) - 3)
    assert packed.positions[0].tolist() == [*range(4), *range(10), *range(9)]
    assert torch.equal(packed.place, batch.mask)
    logits = packed_outputs(tiny_model(), packed).logits
    assert logits.shape[1] == len(packed.predicting) == int(batch.mask.sum())


def test_a_model_whose_packed_rows_see_each_other_is_refused(monkeypatch):
    model = tiny_model()
    forward = type(model).forward

    def without_positions(self, input_ids, position_ids=None, **options):
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(model), "forward", without_positions)
    with pytest.raises(UserError, match="padding_free: Qwen2ForCausalLM"):
        without_padding(LogitsHead(), model)
