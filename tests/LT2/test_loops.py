"""T of every step: the grammar of its options, the draws and their means."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.loops import LoopPlan, parse_loop_plan
from lingua.errors import UserError
from tests.LT2.looped_models import MODELS, ONE_SEGMENT, PER_LOOP, make, packed, prompt
from tests.LT2.tiny import DSA

SCHEDULE = "1@0, 2@0.2, 4@0.5"


def plan(loop_count: int = 4, seed: int = 0, **options: str) -> LoopPlan:
    return parse_loop_plan(loop_count, options.get("schedule"), options.get("sample"), seed)


def draws(plan: LoopPlan, n_steps: int) -> list[int]:
    return [plan.draw(step, n_steps) for step in range(n_steps)]


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, [4] * 10),
        ({"schedule": SCHEDULE}, [1, 1, 2, 2, 2, 4, 4, 4, 4, 4]),
        ({"schedule": "4@0,1@.99"}, [4] * 10),  # the second phase has no step
        ({"schedule": "3@0"}, [3] * 10),
        ({"sample": "uniform:2"}, [2] * 10),
    ],
)
def test_the_loops_of_each_step(options, want):
    assert draws(plan(**options), 10) == want


def test_shares_of_steps_are_rounded():
    assert plan(schedule="1@0, 2@0.29").starts(100) == [0, 29]
    assert plan(schedule="1@0, 2@0.5").starts(3) == [0, 2]


@pytest.mark.parametrize("sample", ["uniform:1,2,2,4", "poisson:2.5"])
def test_draws_have_the_probabilities_and_depend_on_seed_and_step_alone(sample):
    drawn = draws(plan(sample=sample), 1000)
    for n_loops, share in plan(sample=sample).shares().items():
        assert drawn.count(n_loops) / 1000 == pytest.approx(share, abs=0.05)
    assert [plan(sample=sample).draw(step, 9) for step in range(1000)] == drawn
    assert draws(plan(sample=sample, seed=1), 1000) != drawn


def test_uniform_shares():
    assert plan(sample="uniform:1,2,2,4").shares() == {1: 0.25, 2: 0.5, 4: 0.25}


def test_poisson_shares_are_those_of_huginn():
    shares = plan(6, sample="poisson:4").shares()
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(400_000, generator=generator) * 0.5 + torch.log(torch.tensor(3.0)) - 0.125
    sampled = (torch.poisson(tau.exp(), generator=generator) + 1).clamp(max=6)
    for n_loops, share in shares.items():
        assert (sampled == n_loops).float().mean().item() == pytest.approx(share, abs=0.003)
    assert sum(shares.values()) == pytest.approx(1)
    assert plan(200, sample="poisson:4").mean() == pytest.approx(4)


@pytest.mark.parametrize("options", [{}, {"schedule": SCHEDULE}])
def test_means_and_totals(options):
    drawn = draws(plan(**options), 100)
    assert plan(**options).mean(lambda T: T**2) == pytest.approx(sum(T**2 for T in drawn) / 100)
    for first in (0, 30, 100):
        want = sum(T**2 for T in drawn[first:])
        assert plan(**options).total(lambda T: T**2, first, 100) == pytest.approx(want)
    sampled = plan(sample="uniform:1,4")
    assert (sampled.mean(), sampled.total(lambda T: 10 * T, 4, 6)) == (2.5, 50)


@pytest.mark.parametrize(
    "options",
    [
        {"loop_schedule": "2@0.1"},
        {"loop_schedule": "1@0, 2@0.5, 4@0.5"},
        {"loop_schedule": "1@0, 2@0.5, 4@0.2"},
        {"loop_schedule": "0@0, 4@0.5"},
        {"loop_schedule": "1@0, 5@0.5"},
        {"loop_schedule": "1@0, 4@1000"},
        {"loop_schedule": "1@0, 4@-0.5"},
        {"loop_schedule": "1@0,"},
        {"loop_schedule": ""},
        {"loop_schedule": "4"},
        {"loop_sample": "uniform:"},
        {"loop_sample": "uniform:0,1"},
        {"loop_sample": "uniform:2,5"},
        {"loop_sample": "uniform:1.5"},
        {"loop_sample": "poisson:1"},
        {"loop_sample": "poisson:0"},
        {"loop_sample": "poisson:4.5"},
        {"loop_sample": "poisson:nan"},
        {"loop_sample": "1,2,4"},
        {"loop_sample": "normal:2"},
        {"loop_bptt": 0},
        {"loop_bptt": 5},
    ],
)
def test_mistakes_name_the_option_and_its_value(options):
    ((option, value),) = options.items()
    shown = repr(value) if isinstance(value, str) else value
    with pytest.raises(UserError, match=rf"^model\.{option}={shown}"):
        make(loop_count=4, **options)


def test_schedule_and_sample_exclude_each_other():
    with pytest.raises(UserError, match="loop_schedule=.*loop_sample="):
        make(loop_count=4, loop_schedule="1@0", loop_sample="uniform:1,2")


# ---- the model of a step


@pytest.mark.parametrize("name", [*PER_LOOP, *(f"{name}_T2" for name in ONE_SEGMENT)])
def test_a_step_runs_the_model_of_its_loops(name):
    """Every kind of model: with T loops it is the model that was built with T loops."""
    model = make(**MODELS[name])
    tokens, loop_count = prompt(2, 9), model.args.loop_count
    whole, (documents, ends) = model(tokens), packed([prompt(4), prompt(5)])
    for n_loops in range(1, loop_count + 1):
        pattern = model.args.attention_pattern
        if pattern and "->" in pattern:
            pattern = "->".join(pattern.split("->")[:n_loops])
        changes = {"loop_count": n_loops, "attention_pattern": pattern}
        other = make(**{**vars(model.args), **changes})
        weights = model.state_dict()
        if model.rho is not None:
            weights["rho"] = model.rho[:n_loops]
        other.load_state_dict({n: w for n, w in weights.items() if n in other.state_dict()})
        other.begin_step(0)
        model.loop_plan = parse_loop_plan(loop_count, f"{n_loops}@0", None, 0)
        model.begin_step(0)
        assert model.n_loops == n_loops
        assert torch.equal(model(tokens), other(tokens))
        together = other(documents, cu_seqlens=ends)
        assert torch.equal(model(documents, cu_seqlens=ends), together)
    model.begin_step(None)
    assert torch.equal(model(tokens), whole)


def test_gradients_of_unused_loops():
    model = make(loop_count=3, attention_pattern="gdn->full->gdn", loop_schedule="1@0")
    model.begin_step(0)
    model(prompt(2, 9), prompt(2, 9)).backward()
    assert model.rho is not None and model.rho.grad is not None
    assert model.rho.grad[0].all() and not model.rho.grad[1:].any()
    block = model.layers[0]
    missing = {name for name, p in block.named_parameters() if p.grad is None}
    assert missing == {n for n, _ in block.named_parameters() if n.startswith("attention.")}


@pytest.mark.parametrize("n_back", [1, 2])
@pytest.mark.parametrize("kind", [{}, {"mixer": "dsa", "dsa": DSA}, {"weight_tying": True}])
def test_truncated_gradients_are_those_of_a_detached_stream(n_back, kind):
    model = make(loop_count=3, loop_bptt=n_back, **kind)
    tokens = prompt(2, 9)
    loss = model(tokens, tokens)
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    got_losses = model.mixer_losses
    model.zero_grad()

    assert model.rho is not None
    h, own = model.tok_embeddings(tokens), []
    for t in range(3):
        if t == 3 - n_back:
            h, own = h.detach(), []
        u = h
        for block, spec in zip(model.layers, model.layout[t], strict=True):
            h, own_loss = block(h, spec, None, True)
            own += [] if own_loss is None else [own_loss]
        h = h + model.rho[t] * u
    logits = torch.nn.functional.linear(model.norm(h), model.head_weight).flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, tokens.flatten())
    torch.testing.assert_close(loss, nats)
    (nats + (torch.stack(own).mean() if own else 0)).backward()
    if own:
        torch.testing.assert_close(got_losses["dsa_indexer"], torch.stack(own).mean())
    for name, p in model.named_parameters():
        assert (p.grad is None) == (got[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
