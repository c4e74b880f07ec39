"""The natural gradient against the dense Fisher matrix, on a softmax policy small enough for it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.func import functional_call, jacrev
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rlcore as rl
from rlcore.trainers.shared.natural_gradient import (
    Fisher,
    Policy,
    dot,
    improvement_and_kl,
    natural_step,
    search_step,
    supports_forward_ad,
)

ROWS, TOKENS, VOCABULARY, FEATURES = 6, 3, 5, 4
DELTA, TEMPERATURE = 0.01, 0.7


@dataclasses.dataclass(frozen=True)
class Batch:
    state: torch.Tensor  # (B, C, FEATURES)
    target: torch.Tensor
    mask: torch.Tensor
    advantage: torch.Tensor

    def take(self, rows: slice) -> Batch:
        return Batch(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


class Softmax(torch.nn.Module):
    """Logits of a small network on each state."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        shapes = {"first": (FEATURES, 3), "second": (3, VOCABULARY), "bias": (VOCABULARY,)}
        for name, shape in shapes.items():
            value = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, batch: Batch) -> torch.Tensor:
        return (batch.state @ self.first).tanh() @ self.second + self.bias


@pytest.fixture
def policy():
    model = Softmax(torch.Generator().manual_seed(0))
    return Policy(model, dict(model.named_parameters()), TEMPERATURE)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(ROWS, TOKENS, FEATURES, generator=generator, dtype=torch.float64)
    mask = torch.arange(TOKENS) < torch.tensor([3, 1, 2, 3, 0, 2])[:, None]
    target = torch.randint(VOCABULARY, mask.shape, generator=generator)
    advantage = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return Batch(state, target, mask, advantage)


def count(batch) -> float:
    return float(batch.mask.sum())


def flat(vector) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in vector])


def like(policy, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in policy.parameters.values()
    ]


def dense_fisher(policy, batch) -> torch.Tensor:
    """F written out: every token's J^T (diag(p) - p p^T) J, J by reverse mode."""

    def logits(parameters):
        return functional_call(policy.model, parameters, (batch,)) / policy.temperature

    jacobian = jacrev(logits)({name: p.detach() for name, p in policy.parameters.items()})
    jacobian = torch.cat([jacobian[name].flatten(3) for name in policy.parameters], dim=-1)
    p = logits(policy.parameters).detach().softmax(-1)
    curvature = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    per_token = jacobian.mT @ curvature @ jacobian
    return per_token[batch.mask].sum(0) / batch.mask.sum()


def surrogate_gradient(policy, batch) -> list[torch.Tensor]:
    log_p = (policy.logits(batch) / policy.temperature).log_softmax(-1)
    logp = log_p.gather(-1, batch.target[..., None]).squeeze(-1)
    surrogate = ((logp - logp.detach()).exp() * batch.advantage[:, None])[batch.mask].mean()
    gradient = torch.autograd.grad(surrogate, list(policy.parameters.values()))
    return [g.to(zero.dtype) for g, zero in zip(gradient, policy.zeros(), strict=True)]


def proposed(policy, batch, delta: float = DELTA, damping: float = 1e-3):
    fisher = Fisher(policy, [batch], count(batch))
    gradient = surrogate_gradient(policy, batch)
    return natural_step(
        gradient, fisher, fisher, delta=delta, damping=damping, max_iter=200, tol=1e-12
    )


def take(policy, step) -> dict[str, torch.Tensor]:
    """Adds the step; returns what was there before."""
    old = {name: p.detach().clone() for name, p in policy.parameters.items()}
    with torch.no_grad():
        for parameter, part in zip(policy.parameters.values(), step, strict=True):
            parameter += part
    return old


def search(policy, batch, step, **options):
    options = {"delta": DELTA, "shrink": 0.8, "max_trials": 10} | options
    return search_step(policy, step, [batch], count(batch), **options)


def test_a_fisher_product_is_the_dense_matrix_times_the_vector(policy, batch):
    vector = like(policy, 2)
    product = Fisher(policy, [batch], count(batch))(vector)
    torch.testing.assert_close(flat(product), dense_fisher(policy, batch) @ flat(vector))


def test_a_fisher_product_is_the_same_in_any_micro_batches(policy, batch):
    vector = like(policy, 2)
    whole = Fisher(policy, [batch], count(batch))(vector)
    for size in (1, 4):
        parts = [batch.take(slice(start, start + size)) for start in range(0, ROWS, size)]
        torch.testing.assert_close(Fisher(policy, parts, count(batch))(vector), whole)


def test_what_stands_at_tokens_that_do_not_count_has_no_part_in_it(policy, batch):
    other = dataclasses.replace(
        batch, state=torch.where(batch.mask[..., None], batch.state, 1 - batch.state)
    )
    vector, size = like(policy, 2), count(batch)
    product = Fisher(policy, [batch], size)(vector)
    torch.testing.assert_close(Fisher(policy, [other], size)(vector), product)
    old = take(policy, [0.1 * part for part in vector])
    one, two = (improvement_and_kl(policy, old, [each], size) for each in (batch, other))
    assert one == pytest.approx(two, rel=1e-12)


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_the_step_is_the_dense_natural_gradients(policy, batch, damping):
    gradient = flat(surrogate_gradient(policy, batch))
    fisher = dense_fisher(policy, batch)
    direction = torch.linalg.solve(fisher + damping * torch.eye(len(gradient)), gradient)
    expected = (2 * DELTA / (direction @ fisher @ direction)).sqrt() * direction
    found = proposed(policy, batch, damping=damping)
    assert (flat(found.step) - expected).norm() < 1e-4 * expected.norm()
    assert found.expected == pytest.approx(float(gradient @ expected), rel=1e-4)
    assert found.residual < 1e-10


def test_a_damping_of_nearly_nothing_gives_the_undamped_step(policy, batch):
    gradient, fisher = flat(surrogate_gradient(policy, batch)), dense_fisher(policy, batch)
    direction = torch.linalg.lstsq(fisher, gradient, rcond=1e-12, driver="gelsd").solution
    expected = (2 * DELTA / (direction @ fisher @ direction)).sqrt() * direction
    found = flat(proposed(policy, batch, damping=1e-9).step)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("delta", [0.001, 0.01, 0.03])
def test_the_kl_is_about_delta_before_the_line_search_and_within_it_after(policy, batch, delta):
    # linear in what moves: along a curved policy the quadratic model ends sooner
    moving = {name: p for name, p in policy.parameters.items() if name != "first"}
    policy = dataclasses.replace(policy, parameters=moving)
    step = proposed(policy, batch, delta).step
    found = search(policy, batch, step, delta=delta)
    assert 0.9 * delta < found.trials[0].kl <= 1.5 * delta
    assert found.step is not None
    assert 0 < found.kl <= delta


def test_the_search_reports_what_the_moved_policy_does(policy, batch):
    old_logits = policy.logits(batch).detach() / TEMPERATURE
    step = proposed(policy, batch).step
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    found = search(policy, batch, step)
    for (name, parameter), part in zip(policy.parameters.items(), step, strict=True):
        torch.testing.assert_close(parameter.detach(), before[name] + found.step * part)
    old, new = (
        z.log_softmax(-1)[batch.mask] for z in (old_logits, policy.logits(batch) / TEMPERATURE)
    )
    chosen = batch.target[batch.mask][:, None]
    ratio = (new - old).gather(-1, chosen).exp().squeeze(-1)
    advantage = batch.advantage[:, None].expand(batch.mask.shape)[batch.mask]
    assert found.improvement == pytest.approx(((ratio - 1) * advantage).mean().item(), rel=1e-9)
    assert found.kl == pytest.approx((old.exp() * (old - new)).sum(-1).mean().item(), rel=1e-6)


def test_the_expected_improvement_comes_true_for_small_steps(policy, batch):
    found = proposed(policy, batch, delta=1e-8)
    actual = search(policy, batch, found.step, delta=1e-7).improvement
    assert actual == pytest.approx(found.expected, rel=1e-2)


def test_a_rejected_step_leaves_the_weights_bit_identical(policy, batch):
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    backwards = [-part for part in proposed(policy, batch).step]
    found = search(policy, batch, backwards, max_trials=3)
    assert found.step is None and len(found.trials) == 3
    assert all(torch.equal(p, before[name]) for name, p in policy.parameters.items())


def test_a_search_that_fails_leaves_the_weights_bit_identical(policy, batch, monkeypatch):
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}

    def fails(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rl, "categorical_kl", fails)
    with pytest.raises(KeyboardInterrupt):
        search(policy, batch, proposed(policy, batch).step)
    assert all(torch.equal(p, before[name]) for name, p in policy.parameters.items())


def test_a_gradient_of_zero_proposes_no_step(policy, batch):
    still = proposed(policy, dataclasses.replace(batch, advantage=torch.zeros(ROWS).double()))
    assert still.expected == still.residual == 0.0
    assert not flat(still.step).any()


def test_parameters_that_are_not_named_stay_where_they_are(policy, batch):
    some = Policy(policy.model, {"second": policy.model.second}, TEMPERATURE)
    whole = dense_fisher(some, batch)
    vector = like(some, 2)
    product = Fisher(some, [batch], count(batch))(vector)
    torch.testing.assert_close(flat(product), whole @ flat(vector))
    first = policy.model.first.detach().clone()
    assert search(some, batch, proposed(some, batch).step).step is not None
    assert torch.equal(policy.model.first, first)


def test_a_model_without_a_forward_derivative_is_named_with_its_reason(policy, batch):
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    class Model(Softmax):
        def forward(self, batch):
            return Backward.apply(super().forward(batch))

    model = Model(torch.Generator())
    assert supports_forward_ad(policy, batch) is None
    reason = supports_forward_ad(Policy(model, dict(model.named_parameters())), batch)
    assert reason


@pytest.mark.parametrize("dtype, closeness", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_narrower_weights_give_nearly_the_same_step_in_float32_vectors(
    policy, batch, dtype, closeness
):
    exact = flat(proposed(policy, batch, damping=0.1).step)
    narrow = copy.deepcopy(policy.model).to(dtype)
    inputs = dataclasses.replace(
        batch, state=batch.state.to(dtype), advantage=batch.advantage.float()
    )
    policy = Policy(narrow, dict(narrow.named_parameters()), TEMPERATURE)
    step = proposed(policy, inputs, damping=0.1).step
    assert all(part.dtype == torch.float32 for part in step)
    assert (flat(step) - exact).norm() < closeness * exact.norm()


class Peak(TorchDispatchMode):
    """The most bytes that lived at a time in tensors made inside, besides the given ones'."""

    def __init__(self, given):
        super().__init__()
        self.bytes, self.alive = 0, []
        self.given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in given}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.alive = [(storage, size) for storage, size in self.alive if not storage.expired()]
        seen = self.given | {storage.cdata for storage, _ in self.alive}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in seen:
                seen.add(storage.cdata)
                self.alive.append((storage, tensor.untyped_storage().nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self.alive))
        return result


def test_beside_the_gradient_a_step_takes_five_vectors_and_the_search_one(batch):
    # so many weights that activations weigh nothing beside them
    layers = (torch.nn.Linear(128, 128, dtype=torch.float64) for _ in range(8))

    class Deep(torch.nn.Sequential):
        def forward(self, batch):
            return super().forward(batch.state)

    model = Deep(*layers)
    state = torch.randn(*batch.mask.shape, 128, dtype=torch.float64)
    batch = dataclasses.replace(batch, state=state)
    policy = Policy(model, dict(model.named_parameters()))
    size = sum(8 * p.numel() for p in model.parameters())
    parts = [batch.take(slice(row, row + 1)) for row in (0, 1)]
    fisher = Fisher(policy, parts, 4.0)
    gradient = surrogate_gradient(policy, batch)
    given = [*model.parameters(), *gradient]
    with Peak(given) as peak:
        step = natural_step(gradient, fisher, fisher, delta=DELTA, damping=0.1, max_iter=3).step
    assert 4.5 * size < peak.bytes < 5.5 * size
    with Peak([*given, *step]) as peak:
        search_step(policy, step, parts, 4.0, delta=DELTA, shrink=0.5, max_trials=3)
    assert 0.9 * size < peak.bytes < 1.5 * size


def test_an_inner_product_is_that_of_the_flattened_vectors(policy):
    one, two = like(policy, 2), like(policy, 3)
    assert dot(one, two) == pytest.approx(float(flat(one) @ flat(two)))
