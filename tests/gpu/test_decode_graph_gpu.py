"""Decoding with a CUDA graph or with compiled layers equals eager decoding."""

from __future__ import annotations

import copy

import pytest
import torch

from apps.LT2.benchmark.inference_cost import Plan, measure_point
from apps.LT2.benchmark.timing import measure_ceilings
from apps.LT2.exits import ExitRule
from apps.LT2.inference.compiled import compile_layers
from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.inference.early_exit import ExitDecoder
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import cast_for_inference, fuse_projections
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.gla import GLAArgs
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.mixers.nsa import NSAArgs
from tests.LT2.inference.generators import EndlessTokenizer
from tests.LT2.tiny import KINDS, tiny_model
from tests.tolerances import BF16_KERNEL, BF16_LAYER, relative_error

pytestmark = pytest.mark.gpu

# Dims that the kernels of the prefill support: heads of 64, blocks of 16 or more.
DIMS = {"dim": 128, "multiple_of": 64}
GDN = GatedDeltaNetArgs(head_dim=64, expand_v=1.0)
DSA = DSAArgs(top_k=32, n_index_heads=1)
CHANGES = {
    "gdn": {"gdn": GDN},
    "hybrid": {"gdn": GDN},
    "gla": {"gla": GLAArgs(head_dim=64, expand_v=1.0)},
    "mamba2": {"mamba2": Mamba2Args(head_dim=64, state_dim=64)},
    "nsa": {"dim": 1024, "nsa": NSAArgs(block_size=32, n_blocks=4, window_size=40)},
    "dsa": {"dsa": DSA},
    "gdn+dsa": {"gdn": GDN, "dsa": DSA},
}
CHOOSE_KEYS = ("nsa", "dsa", "gdn+dsa")  # rounding may change which keys these select


def make_model(kind: str):
    model = tiny_model(kind, 2, **{**DIMS, **CHANGES.get(kind, {})}).cuda()
    cast_for_inference(model, torch.bfloat16)
    fuse_projections(model)
    return model


def greedy(model, prompt, cache, step, n_tokens: int):
    """Return (tokens, logits) of greedy decoding after a prefill."""
    logits = model.prefill(prompt, cache, last_only=True)
    tokens, all_logits = [], [logits.clone()]
    for _ in range(n_tokens):
        tokens.append(logits[:, 0].argmax(-1, keepdim=True))
        logits = step(tokens[-1])
        all_logits.append(logits.clone())
    return torch.cat(tokens, dim=1), torch.cat(all_logits, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_decode_equals_eager_decode(kind):
    model = make_model(kind)
    cache, eager_cache = model.init_cache(2, 100), model.init_cache(2, 100)
    graph = DecodeGraph(model, cache)
    assert cache.lengths == [0, 0]
    for n_prompt in (70, 33):  # the graph serves several prompts
        prompt = torch.randint(258, (2, n_prompt), device="cuda")
        cache.reset()
        eager_cache.reset()
        got, got_logits = greedy(model, prompt, cache, graph.step, 24)
        want, want_logits = greedy(
            model, prompt, eager_cache, lambda t, c=eager_cache: model.step(t, c), 24
        )
        assert torch.equal(got, want)
        assert relative_error(got_logits, want_logits) <= BF16_KERNEL


def make_generator(model, **options) -> PackedCausalTransformerGenerator:
    cfg = PackedCausalTransformerGeneratorArgs(**{"max_tokens": 4096, **options})
    return PackedCausalTransformerGenerator(cfg, model, EndlessTokenizer())


PROMPTS = [[(7 * i + n) % 256 for i in range(n)] for n in (70, 33, 1, 64, 100)]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_graph_equals_eager_generation(kind):
    """256 greedy tokens each, in rows that are refilled and at the end partly free."""
    model = make_model(kind)

    def generate(graph: bool | None) -> list[list[int]]:
        options = {"max_gen_len": 256, "max_tokens": 3 * 356}
        generator = make_generator(model, reduce_generation_overhead=graph, **options)
        return [done.tokens for done in generator.complete(PROMPTS, score=False)]

    want = generate(False)
    assert [len(tokens) for tokens in want] == [256] * len(PROMPTS)
    assert len({t for tokens in want for t in tokens}) > 8, "too few distinct tokens"
    assert generate(None) == want


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CHOOSE_KEYS])
def test_a_compiled_prefill_scores_prompts_of_any_length(kind):
    torch.compiler.reset()
    model = make_model(kind)

    def scores(model, **options) -> torch.Tensor:
        generator = make_generator(model, max_gen_len=0, **options)
        return torch.cat([s for n in (2, 5, 3) for s in generator.generate(PROMPTS[:n])[1]])

    exact = scores(copy.deepcopy(model).float(), dtype="fp32")
    floor = relative_error(scores(model), exact)
    assert relative_error(scores(model, compile_prefilling=True), exact) <= 2 * floor + BF16_LAYER


@pytest.mark.parametrize("kind", ["full", "hybrid"])
def test_compiled_steps_in_a_graph_serve_any_length(kind):
    """Compares the first tokens: rounding differs, so later tokens may."""
    torch.compiler.reset()
    model = make_model(kind)
    for n in (2, 5, 3):
        answers = [
            [
                done.tokens
                for done in make_generator(model, max_gen_len=8, **o).complete(PROMPTS[:n])
            ]
            for o in ({}, {"compile_decoding": True})
        ]
        firsts = [[tokens[:2] for tokens in answer] for answer in answers]
        same = sum(a == b for a, b in zip(*firsts, strict=True))
        assert same >= n - 1


@pytest.mark.parametrize("kind", ["full", "gdn", "hybrid"])
def test_capture_preserves_a_sequence(kind):
    model = make_model(kind)
    prompt = torch.randint(258, (2, 40), device="cuda")
    cache, eager_cache = model.init_cache(2, 64), model.init_cache(2, 64)
    for c in (cache, eager_cache):
        logits = model.prefill(prompt, c, last_only=True)
    token = logits[:, 0].argmax(-1, keepdim=True)
    graph = DecodeGraph(model, cache)
    for _ in range(8):
        got, want = graph.step(token), model.step(token, eager_cache)
        assert relative_error(got, want) <= BF16_KERNEL
        token = want[:, 0].argmax(-1, keepdim=True)
    assert cache.lengths == eager_cache.lengths == [48, 48]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CHOOSE_KEYS])
def test_compiled_layers_decode_like_eager_ones(kind):
    """With the same input tokens, as fused kernels round differently and may change an argmax."""
    torch.compiler.reset()
    model = make_model(kind)
    compiled = copy.deepcopy(model)
    compile_layers(compiled, "prefill", dynamic=False)
    compile_layers(compiled, "step", dynamic=False)
    tokens = torch.randint(258, (2, 80), device="cuda")
    cache, compiled_cache = model.init_cache(2, 100), compiled.init_cache(2, 100)
    want = [model.prefill(tokens[:, :64], cache)]
    graph = DecodeGraph(compiled, compiled_cache)
    got = [compiled.prefill(tokens[:, :64], compiled_cache)]
    for t in range(64, 80):
        want.append(model.step(tokens[:, t : t + 1], cache))
        got.append(graph.step(tokens[:, t : t + 1]).clone())
    exact = copy.deepcopy(model).float()(tokens)
    floor = relative_error(torch.cat(want, dim=1), exact)
    assert relative_error(torch.cat(got, dim=1), exact) <= 2 * floor + BF16_LAYER


@pytest.mark.parametrize("compiled", [False, True])
def test_a_benchmark_point_is_measured(compiled):
    torch.compiler.reset()
    model = make_model("hybrid")
    if compiled:
        compile_layers(model, "prefill", dynamic=False)
        compile_layers(model, "step", dynamic=False)
    ceilings = measure_ceilings(torch.device("cuda"), torch.bfloat16, repeats=3)
    assert 1e11 < ceilings.copy_bytes_per_s < 2e13 and 1e13 < ceilings.matmul_flops < 1e16
    plan = Plan(2, 1, 4, prefill_chunk=64, compiled=compiled, cuda_graph=True)
    (row,), _ = measure_point({"hybrid": model}, 2, 128, plan, ceilings)
    for cost in (row.prefill, row.decode):
        assert cost.problem == "" and cost.share is not None and 0 < cost.share < 1
        assert cost.peak_gib is not None and cost.peak_gib > 0


def test_out_of_memory_is_reported_and_frees_the_memory():
    model = make_model("full")
    ceilings = measure_ceilings(torch.device("cuda"), torch.bfloat16, repeats=1)
    plan = Plan(1, 1, 1, prefill_chunk=None, compiled=False, cuda_graph=True)
    free = torch.cuda.mem_get_info()[1]
    too_long = free // (3 * 2 * 2 * 128 * 2) + 1  # layers and loops; k and v of 128 in bf16
    (row,), _ = measure_point({"full": model}, 1, too_long, plan, ceilings)
    assert row.prefill.problem == row.decode.problem == "out of memory"
    (row,), _ = measure_point({"full": model}, 1, 64, plan, ceilings)
    assert row.prefill.ms is not None and row.decode.ms is not None


@pytest.mark.parametrize("rule", [ExitRule("gate", 0.6), ExitRule("kl", 0.25)], ids=str)
@pytest.mark.parametrize("n_loops", [3, 8])
@pytest.mark.parametrize("kind", ["full", "hybrid", "window"])
def test_graphs_of_early_exits_equal_eager_exits(kind, n_loops, rule):
    torch.manual_seed(0)
    changes = {**DIMS, **CHANGES.get(kind, {})}
    model = tiny_model(kind, n_loops, **changes, loop_loss="gate").cuda()
    cast_for_inference(model, torch.bfloat16)
    fuse_projections(model)
    model.exit_gate.weight.normal_(std=0.3)
    prompt = torch.randint(258, (2, 40), device="cuda")
    decoders, results = [], []
    for graph in (True, False):
        cache = model.init_cache(2, 80)
        decoders.append(ExitDecoder(model, cache, rule, graph=graph))
        results.append(greedy(model, prompt, cache, decoders[-1].step, 30))
    (got, got_logits), (want, want_logits) = results
    assert torch.equal(got, want)
    assert relative_error(got_logits, want_logits) <= BF16_KERNEL
    loops = [decoder.tally.n_loops / decoder.tally.n_tokens for decoder in decoders]
    assert loops[0] == loops[1] and 1 < loops[0] <= n_loops
