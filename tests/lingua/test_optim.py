"""Learning rate schedules, weight decay groups, and skipping non-finite steps."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from lingua.errors import UserError
from lingua.optim import (
    MuonArgs,
    NonfiniteGuard,
    OptimArgs,
    build_lr_fn,
    build_optimizer,
    is_matrix,
    step_if,
)

N = 200


def curve(n_steps=N, upto=None, **kwargs) -> list[float]:
    """Factors at steps 1, 2, ..."""
    fn = build_lr_fn(OptimArgs(**kwargs), n_steps)
    return [fn(s) for s in range(1, (upto or n_steps) + 1)]


ENDING = [
    {"scheduler": "linear"},
    {"scheduler": "cosine"},
    {"scheduler": "cosine", "cosine_theta": 1.7},
    {"scheduler": "wsd"},
    {"scheduler": "wsd", "decay_fraction": 0.001},
]


@pytest.mark.parametrize("min_ratio", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("warmup", [0, 1, 20])
@pytest.mark.parametrize("kind", ENDING, ids=str)
def test_warmup_then_decay_to_the_minimum(kind, warmup, min_ratio):
    got = curve(upto=2 * N, warmup=warmup, lr_min_ratio=min_ratio, **kind)

    rise, fall = got[: max(warmup, 1)], got[max(warmup, 1) - 1 :]
    assert got[0] > 0, "the first step must have a learning rate"
    if warmup:
        assert rise == [pytest.approx(s / warmup) for s in range(1, warmup + 1)]
        assert max(got) == 1.0
    assert max(got) > 0.99
    assert all(b <= a + 1e-12 for a, b in zip(fall, fall[1:], strict=False)), (
        "no rise after the warmup"
    )
    assert got[N - 1 :] == [pytest.approx(min_ratio, abs=1e-12)] * (N + 1)


def test_midpoints_by_hand():
    half = 110  # halfway from warmup 20 to 200
    base = {"warmup": 20, "lr_min_ratio": 0.1}
    assert curve(scheduler="linear", **base)[half - 1] == pytest.approx(0.55)
    assert curve(scheduler="cosine", **base)[half - 1] == pytest.approx(0.55)
    quarter = curve(scheduler="cosine", **base)[65 - 1]
    assert quarter == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    wsd = curve(scheduler="wsd", **base)
    assert wsd[19:180] == [1.0] * 161
    assert wsd[190 - 1] == pytest.approx(1 / (0.5 * 10 + 0.5))
    assert curve(scheduler="wsd", warmup=20, lr_min_ratio=0)[190 - 1] == pytest.approx(0.5)
    inv = curve(scheduler="inv_sqrt", **base)
    assert inv[80 - 1] == pytest.approx(0.5)
    assert curve(scheduler="inv_sqrt", warmup=0, lr_min_ratio=0)[3] == pytest.approx(0.5)
    assert curve(scheduler="constant") == [1.0] * N


@pytest.mark.parametrize("cycles", [2, 4, 5])
def test_cosine_cycles_restart_at_the_top_and_end_at_the_bottom(cycles):
    got = curve(scheduler="cosine", warmup=0, cycle_length=1 / cycles, lr_min_ratio=0.1)
    length = N // cycles
    for c in range(cycles):
        one = got[c * length : (c + 1) * length]
        assert one == pytest.approx(got[:length], abs=1e-6)
    assert got[length - 1] == pytest.approx(0.1)


def test_wsd_cycles_each_end_in_a_decay():
    got = curve(scheduler="wsd", warmup=10, cycle_length=0.5, decay_fraction=0.2, lr_min_ratio=0.1)
    assert got[9:80] == [1.0] * 71
    assert got[99] == pytest.approx(0.1)
    assert got[100:160] == [1.0] * 60
    assert got[199] == pytest.approx(0.1)


@pytest.mark.parametrize("cycles", range(1, 60))
def test_no_number_of_cycles_restarts_on_the_last_step(cycles):
    assert curve(warmup=0, cycle_length=1 / cycles, lr_min_ratio=0)[-1] < 1e-6


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "wsd", "inv_sqrt"])
def test_warmup_longer_than_the_run_only_rises(scheduler):
    assert curve(n_steps=4, upto=4, warmup=8, scheduler=scheduler) == [0.125, 0.25, 0.375, 0.5]


# Largest drop between two steps after warmup, in units of 1 / decay steps.
STEEPEST = {
    "linear": 1.0,
    "cosine": math.pi / 2 * 1.7,
    "wsd": 9.0,  # 1 / lr grows linearly from 1 to 10
}


@pytest.mark.parametrize("warmup", [0, 1, 20, N - 25, N - 1, N, N + 5])
@pytest.mark.parametrize("kind", [*ENDING[:4], {"scheduler": "inv_sqrt"}], ids=str)
def test_schedules_are_continuous_also_outside_the_run(kind, warmup):
    fn = build_lr_fn(OptimArgs(warmup=warmup, lr_min_ratio=0.1, **kind), N)
    at = [fn(step) for step in range(3 * N)]
    assert all(0 <= x <= 1 for x in at), "also fails for NaN"
    if warmup:
        rise = at[: min(warmup, N) + 1]
        assert rise == [pytest.approx(step / warmup) for step in range(len(rise))]
    name = kind["scheduler"]
    if warmup >= N:
        return
    fall = at[max(warmup, 1) :]
    drops = [a - b for a, b in zip(fall, fall[1:], strict=False)]
    if name == "inv_sqrt":
        assert drops[0] <= 1 - math.sqrt(max(warmup, 1) / (max(warmup, 1) + 1)) + 1e-12
        assert drops == sorted(drops, reverse=True), "the decay slows down and never reverses"
    else:
        length = min(20, N - warmup) if name == "wsd" else N - warmup
        assert min(drops) >= -1e-12 and max(drops) <= STEEPEST[name] / length + 1e-12
        assert at[N:] == [pytest.approx(0.1)] * (2 * N)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(4, 4)
        self.attention_norm = nn.Parameter(torch.ones(4))
        self.q_conv = nn.Conv1d(4, 4, 2, bias=False)
        self.rho = nn.Parameter(torch.zeros(3, 4))
        self.A_log = nn.Parameter(torch.zeros(4))


def test_only_weight_matrices_decay():
    model = Toy()
    optimizer, _ = build_optimizer(model, OptimArgs(warmup=0, scheduler="constant"), 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"wq.weight"}


@pytest.mark.parametrize(
    "name, shape, want",
    [
        ("tok_embeddings.weight", (8, 4), True),
        ("layers.0.attention.wq.weight", (4, 4), True),
        ("layers.0.mixer.b_proj.weight", (4, 4), True),
        ("layers.0.mixer.q_conv.weight", (4, 3), False),
        ("layers.0.mixer.conv1d.weight", (4, 1, 3), False),
        ("layers.0.mixer.A_log", (4, 4), False),
        ("layers.0.mixer.D", (4, 4), False),
        ("layers.0.mixer.dt_bias", (4, 4), False),
        ("layers.0.mixer.o_norm.weight", (4, 4), False),
        ("rho", (4, 4), False),
        ("stack.rho", (4, 4), False),
        ("layers.0.mixer.wD", (4, 4), True),
        ("norm.weight", (4,), False),
    ],
)
def test_is_matrix(name, shape, want):
    assert is_matrix(name, torch.empty(shape)) is want


def test_adamw_step_matches_the_formula_and_uses_the_warmed_up_rate():
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False)
    args = OptimArgs(lr=0.1, warmup=4, weight_decay=0.5, beta1=0.8, beta2=0.9)
    optimizer, scheduler = build_optimizer(model, args, 20)
    w, m, v = model.weight.detach().double().clone(), 0.0, 0.0
    for step in range(1, 4):
        g = torch.randn(3, 3)
        model.weight.grad = g.clone()
        optimizer.step()
        scheduler.step()
        lr = 0.1 * step / 4
        m = 0.8 * m + 0.2 * g.double()
        v = 0.9 * v + 0.1 * g.double() ** 2
        w = w * (1 - lr * 0.5)
        w = w - lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(model.weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_a_skipped_first_step_is_no_wrong_order_of_calls():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_optimizer(nn.Linear(2, 2), OptimArgs(), 10)[1].step()
    assert not caught


def test_resumed_scheduler_gives_the_next_step_the_right_rate():
    model = nn.Linear(2, 2)
    args = OptimArgs(lr=0.1, warmup=3)
    optimizer, scheduler = build_optimizer(model, args, 10)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        if len(rates) == 5:
            saved = scheduler.state_dict()
    assert rates[5] != rates[0]

    optimizer, scheduler = build_optimizer(model, args, 10)
    scheduler.load_state_dict(saved)
    again = []
    for _ in range(4):
        again.append(optimizer.param_groups[0]["lr"])
        assert {group["lr"] for group in optimizer.param_groups} == {again[-1]}
        optimizer.step()
        scheduler.step()
    assert again == rates[5:], "bit-exact"


def test_nonfinite_guard_skips_up_to_its_limit_in_a_row():
    guard = NonfiniteGuard(limit=2)
    assert [guard.skip(x) for x in (1.0, math.nan, math.inf, 1.0, math.nan, math.nan)] == [
        False, True, True, False, True, True,
    ]  # fmt: skip
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        guard.skip(math.nan)
    with pytest.raises(FloatingPointError):
        NonfiniteGuard(limit=0).skip(math.inf)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_no_weight_and_no_state(name):
    def train(*gradients: float) -> dict[str, Any]:
        torch.manual_seed(0)
        model = Toy()
        args = OptimArgs(name=name, warmup=0)
        optimizer, _ = build_optimizer(model, args, 10, used_rows={model.rho: lambda: 2})
        for gradient in gradients:
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
            step_if(torch.tensor(math.isfinite(gradient)), optimizer)
        state = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
        return deepcopy({"weights": model.state_dict(), "state": state})

    want = train(1.0, 2.0)
    assert want["state"]["rho"]["step"].tolist() == [2, 2, 0]
    got = train(math.nan, 1.0, math.nan, 2.0, math.inf)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"scheduler": "cosin"}, "optim.scheduler=cosin"),
        ({"clip": -1.0}, "optim.clip=-1.0"),
        ({"lr_min_ratio": 2.0}, "optim.lr_min_ratio=2.0"),
        ({"scheduler": "wsd", "decay_fraction": 0.6, "cycle_length": 0.5}, "optim.decay_fraction"),
        ({"beta2": 1.0}, "optim.beta2=1.0"),
    ],
)
def test_bad_values_name_their_option(kwargs, message):
    with pytest.raises(UserError, match=message):
        OptimArgs(**kwargs)


@pytest.mark.parametrize(
    "kwargs, option",
    [
        ({"exp_factor": 0.7}, "optim.exp_factor=0.7"),
        ({"scheduler": "linear", "cycle_length": 0.5}, "optim.cycle_length=0.5"),
        ({"scheduler": "constant", "warmup": 20}, "optim.warmup=20"),
        ({"scheduler": "constant"}, "optim.warmup=2000"),
        ({"scheduler": "constant", "lr_min_ratio": 0.5, "warmup": 0}, "optim.lr_min_ratio=0.5"),
        ({"muon": MuonArgs(momentum=0.9)}, "optim.muon"),
        ({"scheduler": "constant", "warmup": 0, "lr_min_ratio": 1.0}, None),
        ({"scheduler": "inv_sqrt", "exp_factor": 0.7}, None),
        ({"name": "muon", "muon": MuonArgs(momentum=0.9)}, None),
    ],
)
def test_an_option_without_effect_is_one_warning(kwargs, option, caplog):
    build_optimizer(nn.Linear(2, 2), OptimArgs(**kwargs), 10_000)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == (option is not None)
    assert option is None or option in warnings[0]


# ---- rows of a parameter


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_unused_rows_neither_move_nor_decay_and_used_rows_are_parameters_of_their_own(name, betas):
    """The reference has a parameter for each row, without a gradient while the row is unused."""
    torch.manual_seed(0)
    model, used = Toy(), [3, 1, 2, 1, 3, 2]
    nn.init.normal_(model.rho)
    rows = [nn.Parameter(row.detach().clone()) for row in model.rho]
    args = OptimArgs(
        name=name, warmup=0, scheduler="constant", lr=0.1, beta1=betas[0], beta2=betas[1]
    )
    now = iter(used)
    optimizer, _ = build_optimizer(model, args, 10, used_rows={model.rho: lambda: next(now)})
    plain = torch.optim.AdamW(rows, lr=0.1, betas=betas, eps=args.epsilon, weight_decay=0)
    for n in used:
        model.rho.grad = torch.zeros_like(model.rho)
        for row, param in enumerate(rows):
            param.grad = torch.randn(4) if row < n else None
            if param.grad is not None:
                model.rho.grad[row] = param.grad
        optimizer.step()
        plain.step()
        torch.testing.assert_close(model.rho.detach(), torch.stack([*rows]).detach())
    assert optimizer.state[model.rho]["step"].tolist() == [6, 4, 2]


@pytest.mark.parametrize("first", [True, False])
def test_counts_of_rows_follow_a_change_of_used_rows(first):
    model = Toy()
    state: dict[str, torch.Tensor] = {}
    for varies in (first, not first):
        used: dict[torch.Tensor, Any] = {model.rho: lambda: 2} if varies else {}
        optimizer, _ = build_optimizer(model, OptimArgs(), 10, used_rows=used)
        if varies != first:
            optimizer.state[model.rho] = state
        for _ in range(2):
            model.rho.grad = torch.ones_like(model.rho)
            optimizer.step()
        state = dict(optimizer.state[model.rho])
    assert state["step"].tolist() == (4 if first else [4, 4, 2])


def test_a_second_warmup_follows_each_restart():
    args = OptimArgs(scheduler="linear", warmup=0, rewarmup=4, lr_min_ratio=0.0)
    _, schedule = build_optimizer(nn.Linear(2, 2), args, 20, restarts=(5, 7))
    assert [schedule.lr_lambdas[0](done) for done in (4, 5, 6, 7, 9, 10, 12)] == pytest.approx(
        [0.75, 0.7 / 4, 0.65 / 2, 0.6 / 4, 0.5 * 3 / 4, 0.45, 0.35]
    )
