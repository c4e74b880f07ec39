"""What GAE, returns and shaped rewards mean: identities, masks, ends, bad input, no gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from helpers.scans import (
    Rows,
    assert_close,
    check_from_scores,
    check_gae,
    check_return,
    check_shaped,
    naive_gae,
    random_rows,
    scan_as_a_tree,
    scores_for,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlcore as rl


@pytest.fixture(autouse=True)
def seed(device, monkeypatch):
    torch.manual_seed(0)
    if DEVICE == "cpu":
        scan_as_a_tree(monkeypatch)


def dense(rows: int, length: int, **options) -> Rows:
    return random_rows(rows, length, counted=None, terminated=None, **options)


def run(rows: Rows, backend: str, **options):
    """GAE, brought back to the CPU."""
    out = rl.gae(
        rows.reward.to(DEVICE), rows.value.to(DEVICE),
        backend=backend, **rows.options(), **options,
    )  # fmt: skip
    return rl.GAE(*(x.cpu() for x in out))


shares = st.sampled_from([None, 0.0, 0.1, 0.7, 1.0])
fractions = st.sampled_from([0.0, 0.03125, 0.5, 0.875, 0.984375, 1.0])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 150)),
    counted=shares,
    terminated=shares,
    bootstrap=st.booleans(),
    gamma=fractions,
    lam=fractions,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_gae_and_returns_equal_the_loops_over_tokens(
    backend, shape, counted, terminated, bootstrap, gamma, lam, dtype, seed
):
    torch.manual_seed(seed)
    options = {"counted": counted, "terminated": terminated, "bootstrap": bootstrap}
    rows = random_rows(*shape, dtype=dtype, **options)
    check_gae(rl.gae, rows, backend=backend, gamma=gamma, lam=lam)
    check_return(rl.discounted_return, rows, backend=backend, gamma=gamma)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 150)),
    counted=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
    terminated=shares,
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    seed=st.integers(0, 2**31),
)
def test_shaped_rewards_and_their_gae_equal_the_loops(
    backend, shape, counted, terminated, kl_estimator, seed
):
    torch.manual_seed(seed)
    rows = random_rows(*shape, counted=counted, terminated=terminated)
    check_shaped(rl.shaped_reward, rows, backend=backend, kl_estimator=kl_estimator)
    check_from_scores(rl.gae_from_scores, rows, backend=backend, kl_estimator=kl_estimator)


def test_gae_of_three_tokens_worked_out_by_hand(backend):
    """delta = (1 + 2 - 4, 0 + 3 - 4, 8 + 3 - 6); gamma lam = 1/4."""
    rows = Rows(
        torch.tensor([[1.0, 0.0, 8.0]]), torch.tensor([[4.0, 4.0, 6.0]]),
        last_value=torch.tensor([6.0]),
    )  # fmt: skip
    out = run(rows, backend, gamma=0.5, lam=0.5)
    assert out.advantage.tolist() == [[-1 + (-1 + 5 / 4) / 4, -1 + 5 / 4, 5.0]]
    assert out.returns.tolist() == [[4 - 1 + 1 / 16, 4.25, 11.0]]


def test_lam_zero_gives_td_errors(backend):
    rows = dense(3, 70)
    following = torch.cat([rows.value[:, 1:], rows.last_value[:, None]], 1)
    errors = rows.reward.double() + 0.5 * following - rows.value
    assert_close(run(rows, backend, gamma=0.5, lam=0.0).advantage, errors, "TD errors")


def test_lam_one_gives_returns_minus_values(backend):
    rows = random_rows(3, 70)
    total = rl.discounted_return(
        rows.reward.to(DEVICE), gamma=0.875, backend=backend, **rows.options()
    ).cpu()
    out = run(rows, backend, gamma=0.875, lam=1.0)
    torch.testing.assert_close(out.returns, total)
    expected = torch.where(rows.mask, total - rows.value, 0)
    torch.testing.assert_close(out.advantage, expected, atol=2e-6, rtol=0)


def test_gamma_zero_gives_rewards_minus_values(backend):
    rows = random_rows(3, 70)
    out = run(rows, backend, gamma=0.0)
    assert torch.equal(out.advantage, torch.where(rows.mask, rows.reward - rows.value, 0))


def test_a_row_alone_equals_the_row_in_a_batch(backend):
    rows = random_rows(5, 70)
    batch = run(rows, backend)
    for i in range(5):
        row = slice(i, i + 1)
        alone = run(Rows(*(x[row] for x in vars(rows).values())), backend)
        for a, b in zip(alone, batch, strict=True):
            assert torch.equal(a, b[row]) if backend == "triton" else a.allclose(b[row], atol=1e-6)


def spread(x: torch.Tensor, place: torch.Tensor, length: int) -> torch.Tensor:
    """x (B, T) at the columns `place` of (B, length), NaN (or false) elsewhere."""
    fill = False if x.dtype == torch.bool else float("nan")
    wide = torch.full((len(x), length), fill, dtype=x.dtype)
    wide[:, place] = x
    return wide


@pytest.mark.parametrize("name", ["left pads", "right pads", "pads and tool tokens"])
@pytest.mark.parametrize("ends", [False, True])
def test_tokens_that_do_not_count_change_no_other(name, ends, backend):
    rows = dense(3, 45)
    if ends:
        rows = Rows(rows.reward, rows.value, None, torch.rand(3, 45) < 0.1, rows.last_value)
    place = {
        "left pads": torch.arange(45) + 20,
        "right pads": torch.arange(45),
        "pads and tool tokens": torch.randperm(58)[:45].sort().values + 3,
    }[name]
    wide = [None if x is None else spread(x, place, 65) for x in (rows.reward, rows.value)]
    cuts = spread(rows.terminated, place, 65) if ends else None
    mask = spread(torch.ones(3, 45, dtype=torch.bool), place, 65)
    if ends:
        cuts = cuts | ~mask  # an end where nothing counts is no end
    padded, plain = run(Rows(*wide, mask, cuts, rows.last_value), backend), run(rows, backend)
    for a, b in zip(padded, plain, strict=True):
        torch.testing.assert_close(a[:, place], b, atol=2e-6, rtol=0)
        assert not a[~mask].any()


def test_episodes_packed_into_one_row_equal_episodes_in_rows(backend):
    rows = dense(4, 23, bootstrap=False)
    ends = torch.zeros(1, 92, dtype=torch.bool)
    ends[:, 22::23] = True
    packed = run(Rows(rows.reward.view(1, -1), rows.value.view(1, -1), None, ends), backend)
    for a, b in zip(packed, run(rows, backend), strict=True):
        torch.testing.assert_close(a.view(4, 23), b, atol=2e-6, rtol=0)


def test_a_truncated_row_bootstraps_and_an_ended_one_does_not(backend):
    rows = dense(2, 9)
    ends = torch.zeros(2, 9, dtype=torch.bool)
    ends[1, -1] = True
    out = run(Rows(rows.reward, rows.value, None, ends, rows.last_value), backend, gamma=0.5)
    bootstrap = 0.5 * rows.last_value * torch.tensor([1, 0])
    last = rows.reward[:, -1] + bootstrap - rows.value[:, -1]
    torch.testing.assert_close(out.advantage[:, -1], last)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)], ids=str)
def test_empty_and_single_token_batches(shape, backend):
    rows = random_rows(*shape)
    check_gae(rl.gae, rows, backend=backend)
    check_from_scores(rl.gae_from_scores, rows, backend=backend)


def test_strided_inputs_are_read_as_they_are(backend):
    value, reward = torch.randn(2, 3, 81)
    rows = Rows(reward[:, 1:], value[:, :-1], torch.rand(80, 3).t() < 0.7)
    check_gae(rl.gae, rows, backend=backend)


def test_the_default_backend_takes_any_fraction(device):
    """gamma and lam that float32 does not hold, in float64."""
    rows = random_rows(3, 70, dtype=torch.float64)
    check_gae(rl.gae, rows, backend="torch", gamma=0.99, lam=0.95)


def test_nothing_is_written_to_the_inputs(backend):
    rows = random_rows(3, 70)
    copies = [x.clone() for x in vars(rows).values()]
    run(rows, backend)
    for x, copy in zip(vars(rows).values(), copies, strict=True):
        assert torch.equal(x.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_no_gradient_flows_through_a_target(backend):
    rows = dense(2, 9)
    reward, value = (x.to(DEVICE).requires_grad_() for x in (rows.reward, rows.value))
    out = rl.gae(reward, value, backend=backend)
    assert not any(x.requires_grad for x in out)
    assert not rl.discounted_return(reward, backend=backend).requires_grad
    mask = torch.ones_like(reward, dtype=torch.bool)
    shaped = rl.shaped_reward(value[:, 0], reward, value, mask, beta=0.1, backend=backend)
    assert not shaped.requires_grad
    scored = rl.gae_from_scores(value[:, 0], reward, value, value, mask, beta=0.1, backend=backend)
    assert not any(x.requires_grad for x in scored)


def test_the_moments_whiten_the_advantages(backend):
    rows = random_rows(4, 50, terminated=None)
    moved = [x.to(DEVICE) for x in (*scores_for(rows), rows.value, rows.mask)]
    out = rl.gae_from_scores(*moved, beta=0.1, backend=backend)
    white = (out.advantage - out.mean) * (out.variance + 1e-8).rsqrt()
    white = torch.where(moved[-1], white, 0)
    torch.testing.assert_close(white, rl.whiten(out.advantage, moved[-1]), atol=1e-5, rtol=1e-5)


def test_a_score_goes_to_the_last_counted_token_and_to_no_pad(backend):
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool().to(DEVICE)
    logp = torch.zeros(2, 5, device=DEVICE)
    score = torch.tensor([3.0, 4.0], device=DEVICE)
    reward = rl.shaped_reward(score, logp, logp, mask, beta=1.0, backend=backend)
    assert reward.tolist() == [[0, 0, 0, 3, 0], [0] * 5]


X, ROW, FLAG = torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool)
BAD = {
    "value must have shape (2, 3)": lambda: rl.gae(X, X[:, 1:]),
    "reward must have shape (B, T)": lambda: rl.gae(ROW, ROW),
    "mask must be bool": lambda: rl.gae(X, X, mask=X),
    "terminated must be bool": lambda: rl.gae(X, X, terminated=FLAG.int()),
    "last_value must have shape (2,)": lambda: rl.gae(X, X, last_value=X),
    "reward must be float32": lambda: rl.gae(X.int(), X),
    "gamma must lie in [0, 1], got 1.5": lambda: rl.gae(X, X, gamma=1.5),
    "lam must lie in [0, 1], got nan": lambda: rl.gae(X, X, lam=float("nan")),
    "value must be on the device of reward": lambda: rl.gae(X, X.to("meta")),
    "backend must be one of": lambda: rl.gae(X, X, backend="cuda"),
    "gamma must lie": lambda: rl.discounted_return(X, gamma=-0.1),
    "score must have shape (2,)": lambda: rl.shaped_reward(X, X, X, FLAG, beta=0.1),
    "beta must be a finite number": lambda: rl.shaped_reward(ROW, X, X, FLAG, beta=float("inf")),
    "kl_estimator must be one of 'k1', 'k2', 'k3'": lambda: rl.shaped_reward(
        ROW, X, X, FLAG, beta=0.1, kl_estimator="k4"
    ),
    "ref_logp must have shape": lambda: rl.gae_from_scores(ROW, X, ROW, X, FLAG, beta=0.1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [64, 100])
def test_a_value_of_zero_and_lam_one_is_the_discounted_return(length, backend):
    rows = random_rows(2, length)
    still = Rows(rows.reward, rows.value * 0, rows.mask, rows.terminated, rows.last_value)
    advantage, _ = naive_gae(still, 0.75, 1.0)
    out = rl.discounted_return(
        rows.reward.to(DEVICE), gamma=0.75, backend=backend, **rows.options()
    )
    assert_close(out, advantage, "discounted return")


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_shaped_rewards_of_banned_tokens(backend, kl_estimator):
    logp = torch.tensor([[-torch.inf, -200.0, -1.0]])
    ref_logp = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    given = [x.to(DEVICE) for x in (torch.ones(1), logp, ref_logp, mask)]
    options = {"kl_estimator": kl_estimator, "backend": backend}
    assert rl.shaped_reward(*given, beta=0.0, **options).tolist() == [[0, 0, 1]]
    reward = rl.shaped_reward(*given, beta=0.1, **options).cpu()
    # equal probabilities, 0 and 0 too, have no KL
    assert reward[0, 0] == 0 and reward[0, 2] == -torch.inf and not reward.isnan().any()
