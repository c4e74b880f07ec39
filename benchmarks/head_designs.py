"""Another design of the fused head: exponentials over the old lse, made while a tile is at hand.

    E = exp(z - old_lse),  S = sum E,  logp = z[target] - old_lse - log S,  g = dloss/dlogp
    dhidden = (-g / S) E' W + g (1 - p) W[target],   dW = E'^T ((-g / S) hidden) + ...

E' is E without its target column: 1 - p is then a sum, and no difference of numbers near 1. No row
kernel runs over the logits, and fp32 logits are stored nowhere. Rows whose S is out of range go to
`rl.linear_policy_loss`. On a GPU the tile's epilogue is a Triton kernel, on a CPU a slice of the
vocabulary that is still in the cache. PPO's clipped loss; no entropy bonus, no softcap.
"""

from __future__ import annotations

import torch
from torch import Tensor

import rlcore as rl
from rlcore.bench.contestants.rows import Contestant
from rlcore.bench.operations import EPSILON, Inputs
from rlcore.kernels.backend import INTERPRETED
from rlcore.kernels.head.products import Products

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 768 << 20}
SLICE = 2048  # columns of the vocabulary, on a CPU
LEAST_SUM, LARGEST_SUM = 1e-30, 1e30


def exponentials(
    hidden: Tensor, weight: Tensor, target: Tensor, old_lse: Tensor, e: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of E', z[target]), each (n,); E' lands in e (n, V)."""
    if hidden.is_cuda or INTERPRETED:
        from epilogue_kernel import tile_sums

        _, total, _, chosen = tile_sums(hidden, weight, target, old_lse, e)
        return total.sum(0), chosen.sum(0)
    total, chosen = torch.zeros_like(old_lse), torch.zeros_like(old_lse)
    z = old_lse.new_empty(len(hidden) * SLICE)
    for start in range(0, len(weight), SLICE):
        part = weight[start : start + SLICE]
        tile = z[: len(hidden) * len(part)].view(len(hidden), len(part))
        tile = Products(part, None).logits(hidden, tile).sub_(old_lse[:, None])
        here = ((target >= start) & (target < start + len(part))).nonzero().squeeze(-1)
        column = target[here] - start
        chosen[here] = tile[here, column] + old_lse[here]
        tile.exp_()
        tile[here, column] = 0.0
        total += tile.sum(1)
        e[:, start : start + SLICE] = tile
    return total, chosen


def loss_and_gradients(inputs: Inputs, chunk_bytes: int | None = None) -> tuple[Tensor, ...]:
    """(loss, dhidden, dweight); the inputs are those of the bench, with old_lse (N,)."""
    hidden, weight, mask = inputs["hidden"], inputs["weight"], inputs["mask"]
    products = Products(weight, None)
    dhidden, loss = torch.zeros_like(hidden), inputs["old_logp"].new_zeros(())
    dweight = torch.zeros(weight.shape, dtype=products.accumulator, device=weight.device)
    size = (chunk_bytes or CHUNK_BYTES[hidden.device.type]) // (len(weight) * hidden.itemsize)
    memory, unfit = memory_for(min(max(size, 1), len(hidden)), weight), []
    for rows in mask.nonzero().squeeze(-1).split(len(memory)):
        e, target = memory[: len(rows)], inputs["target"][rows]
        others, chosen = exponentials(hidden[rows], weight, target, inputs["old_lse"][rows], e)
        own = (chosen - inputs["old_lse"][rows]).exp()
        total = others + own
        fits = (total > LEAST_SUM) & (total < LARGEST_SUM)
        if not fits.all():
            unfit.append(rows[~fits])
        logp = chosen - inputs["old_lse"][rows] - total.log()
        ratio, advantage = (logp - inputs["old_logp"][rows]).exp(), inputs["advantage"][rows]
        bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage
        g = -torch.where(ratio * advantage <= bounded, ratio * advantage, 0.0) / inputs["num_items"]
        token_loss = -torch.min(ratio * advantage, bounded)
        loss += torch.where(fits, token_loss, 0.0).sum() / inputs["num_items"]
        flows = fits & (g != 0)
        if not flows.all():
            e, rows, target = e[flows], rows[flows], target[flows]
            g, others, total = g[flows], others[flows], total[flows]
        g, over_total = g[:, None], (-g / total)[:, None]
        at_target = g * (others / total)[:, None]
        product = torch.mm(e, weight).to(g.dtype)
        dhidden[rows] = product.mul_(over_total).add_(at_target * weight[target]).to(hidden.dtype)
        products.add_dweight(e, (hidden[rows] * over_total).to(hidden.dtype), dweight)
        # sorted, not atomic: the same bits twice
        dweight.index_put_((target,), at_target * hidden[rows].to(g.dtype), accumulate=True)
    if unfit:
        rest = by_the_row_kernel(inputs, torch.cat(unfit))
        loss, dhidden, dweight = loss + rest[0], dhidden + rest[1], dweight + rest[2]
    return loss, dhidden, dweight.to(weight.dtype)


def memory_for(tokens: int, weight: Tensor) -> Tensor:
    if weight.is_cuda or INTERPRETED:
        from epilogue_kernel import exponentials_memory

        return exponentials_memory(tokens, len(weight), weight)
    return weight.new_empty(tokens, len(weight))


def by_the_row_kernel(inputs: Inputs, rows: Tensor) -> tuple[Tensor, ...]:
    hidden, weight = (inputs[n].detach().requires_grad_() for n in ("hidden", "weight"))
    mask = torch.zeros_like(inputs["mask"])
    mask[rows] = True
    loss = rl.linear_policy_loss(
        hidden, weight, inputs["target"], inputs["advantage"], old_logp=inputs["old_logp"],
        mask=mask, epsilon=EPSILON, num_items=inputs["num_items"],
    ).loss  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


class _OverOldLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, inputs):
        loss, *gradients = loss_and_gradients(inputs | {"hidden": hidden, "weight": weight})
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return *(gradient * dloss for gradient in ctx.saved_tensors), None


def over_old_lse(inputs: Inputs) -> tuple[Tensor]:
    """The design as a contestant of linear_policy_loss."""
    return (_OverOldLse.apply(inputs["hidden"], inputs["weight"], inputs),)


def with_old_lse(inputs: Inputs) -> Inputs:
    """The inputs and the lse of an old policy that is a little way off."""
    with torch.no_grad():
        lse = rl.linear_token_logprob(
            inputs["hidden"], inputs["weight"], inputs["target"], entropy=False
        ).lse
    return inputs | {"old_lse": lse + 0.1 * torch.cos(torch.arange(len(lse), device=lse.device))}


def tile_statistics(inputs: Inputs) -> tuple[Tensor, ...]:
    """Statistics in the product's epilogue, as a contestant of linear_token_logprob's forward."""
    from epilogue_kernel import token_logprob

    mask = inputs["mask"]
    found = token_logprob(inputs["hidden"][mask], inputs["weight"], inputs["target"][mask])
    zeros = torch.zeros(mask.shape, device=mask.device)
    return tuple(zeros.masked_scatter(mask, x) for x in found[:2])


DIRECTIONS = {"linear_policy_loss": "forward+backward", "linear_token_logprob": "forward"}
DESIGNS = {
    "linear_policy_loss": Contestant(over_old_lse, prepare=with_old_lse),
    "linear_token_logprob": Contestant(tile_statistics, needs_gpu=True),
}
