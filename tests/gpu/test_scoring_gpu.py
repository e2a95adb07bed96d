"""Packed scores on CUDA equal single requests on the CPU, in fp32."""

from __future__ import annotations

import pytest

from apps.LT2.evaluation.scoring import score_continuations
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from lingua.tokenizer import ByteTokenizer
from tests.LT2.tiny import tiny_model

pytestmark = pytest.mark.gpu

TOKENS = list(b"the quick brown fox jumps over the lazy dog and once more over it")
REQUESTS = [(TOKENS[: 3 + 5 * i], TOKENS[3 + 5 * i : 6 + 7 * i]) for i in range(8)]


@pytest.mark.parametrize("kind", ["full", "hybrid"])
def test_scores_on_cuda_equal_the_cpu(kind):
    model = tiny_model(kind, 2)
    limits = {"max_len": 24, "max_tokens": 64}
    want = [score_continuations(model, [request], **limits)[0] for request in REQUESTS]
    got = score_continuations(model.cuda(), REQUESTS, **limits)
    assert [score for score, _ in got] == pytest.approx([s for s, _ in want], rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "hybrid"])
def test_scoring_does_not_change_the_answers(kind):
    model = tiny_model(kind, 2).cuda()
    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=8)
    generator = PackedCausalTransformerGenerator(cfg, model, ByteTokenizer())
    prompts = [context for context, _ in REQUESTS]
    scored = [done.tokens for done in generator.complete(prompts)]
    assert [done.tokens for done in generator.complete(prompts, score=False)] == scored
