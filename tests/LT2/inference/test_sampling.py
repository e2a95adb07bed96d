"""Samples have the distribution that the options describe."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from apps.LT2.inference.sampling import invert_cdf, sample_tokens, sequence_rng

LOGITS = torch.tensor([[1.0, 3.0, -2.0, 2.5, 0.0, 2.5]])
N = 20_000
EVEN_U = (torch.arange(N, dtype=torch.float64) + 0.5) / N  # evenly spaced in [0, 1)


def shares(**options) -> torch.Tensor:
    """Return the frequency of each token over EVEN_U."""
    drawn = sample_tokens(LOGITS.expand(N, -1), EVEN_U, **options)
    return torch.bincount(drawn, minlength=LOGITS.shape[1]) / N


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Compare frequencies; each may be off by one draw at either end of its interval."""
    return bool((got - want).abs().max() <= 2 / N)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_scales_logits(temperature):
    assert close(shares(temperature=temperature), (LOGITS[0] / temperature).softmax(-1))


def test_temperature_0_is_argmax_and_a_tiny_one_is_finite():
    assert sample_tokens(LOGITS, EVEN_U[:1], temperature=0).item() == 1
    assert shares(temperature=1e-300)[1] == 1


@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 100])
def test_top_k_keeps_exactly_k(top_k):
    got = shares(temperature=1.0, top_k=top_k)
    kept = got > 0
    assert kept.sum() == min(top_k, 6)
    assert LOGITS[0][kept].min() >= LOGITS[0][~kept].max() if top_k < 6 else True
    assert close(got, LOGITS[0].where(kept, torch.tensor(-math.inf)).softmax(-1))


def test_top_p_keeps_the_fewest_top_tokens_that_reach_p():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for top_p, kept in [
        (0.05, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.75, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ]:
        drawn = sample_tokens(probs.log().expand(N, -1), EVEN_U, temperature=1.0, top_p=top_p)
        assert sorted(set(drawn.tolist())) == kept, top_p
        want = torch.zeros(4)
        want[kept] = probs[0, kept] / probs[0, kept].sum()
        assert close(torch.bincount(drawn, minlength=4) / N, want)


def test_top_p_applies_after_temperature_and_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # With top_k=2 the first token has probability 4/7; without, 0.4.
    drawn = sample_tokens(logits.expand(N, -1), EVEN_U, temperature=1.0, top_k=2, top_p=0.5)
    assert set(drawn.tolist()) == {0}
    # Temperature 1/2 squares the probabilities: the first token has 16/30.
    drawn = sample_tokens(logits.expand(N, -1), EVEN_U, temperature=0.5, top_p=0.5)
    assert set(drawn.tolist()) == {0}


def test_rows_are_independent():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    u = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"temperature": 0.8, "top_k": 7, "top_p": 0.9}
    together = sample_tokens(logits, u, **options)
    alone = [sample_tokens(logits[i : i + 1], u[i : i + 1], **options) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_extreme_random_numbers_select_no_token_of_weight_0():
    weights = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7 + 2**-40, 0.0]], dtype=torch.float64)
    assert invert_cdf(weights, torch.tensor([0.0])).item() == 2
    assert invert_cdf(weights, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 4


def test_sequences_have_separate_random_numbers():
    def draw(seed: int, prompt: int, sample: int) -> list[float]:
        rng = sequence_rng(seed, prompt, sample)
        return [rng.random() for _ in range(3)]

    assert draw(1, 2, 3) == draw(1, 2, 3)
    places = itertools.product(range(5), range(12), range(12))  # 1 11 is not 11 1
    assert len({tuple(draw(*place)) for place in places}) == 5 * 12 * 12
