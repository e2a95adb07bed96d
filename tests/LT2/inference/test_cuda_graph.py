"""DecodeGraph with a fake of torch.cuda, and what a capture needs of the model and its cache."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from apps.LT2.inference import generator
from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.mixers import MIXERS
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer
from tests.LT2.tiny import CACHE_KINDS, KINDS, tiny_args, tiny_model


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        pass


class FakeGraph:
    """Runs the step again. Like a replay, it doesn't change the counters on the host."""

    graph: DecodeGraph

    def replay(self) -> None:
        lengths = list(self.graph.cache.lengths)
        self.graph.cache.lengths[:] = [0] * len(lengths)
        graph = self.graph
        graph.logits_B1V.copy_(graph.model.step(graph.tokens_B1, graph.cache))
        self.graph.cache.lengths[:] = lengths


@pytest.fixture
def cuda(monkeypatch):
    """The part of torch.cuda that DecodeGraph uses. A fake capture runs the step."""

    @contextmanager
    def capture(_, capture_error_mode):
        yield

    for name, fake in {
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def make_graph(model, cache) -> DecodeGraph:
    graph = DecodeGraph(model, cache)
    graph.graph.graph = graph
    return graph


def contents(cache) -> list[torch.Tensor]:
    return [t for loop in cache.mixers for mixer in loop for t in mixer.snapshot()]


def greedy(model, prompt, cache, step, n_tokens: int) -> list[torch.Tensor]:
    logits = model.prefill(prompt, cache, last_only=True)
    tokens = []
    for _ in range(n_tokens):
        tokens.append(logits[:, 0].argmax(-1, keepdim=True))
        logits = step(tokens[-1])
    return tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [0, 7])
def test_capture_restores_the_cache(cuda, kind, held):
    model = tiny_model(kind, loop_count=2)
    cache = model.init_cache(2, 12)
    if held:
        model.prefill(torch.randint(258, (2, held)), cache)
    before, lengths = contents(cache), list(cache.lengths)
    make_graph(model, cache)
    torch.testing.assert_close(contents(cache), before, rtol=0, atol=0)
    assert cache.lengths == lengths == [held] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_graph_decode_equals_eager_decode_over_several_prompts(cuda, kind):
    model = tiny_model(kind, loop_count=2)
    cache, eager_cache = model.init_cache(2, 20), model.init_cache(2, 20)
    graph = make_graph(model, cache)
    for n_prompt in (9, 3):  # the graph serves several sequences
        prompt = torch.randint(258, (2, n_prompt))
        cache.reset()
        eager_cache.reset()
        got = greedy(model, prompt, cache, graph.step, 8)
        eager = greedy(model, prompt, eager_cache, lambda t: model.step(t, eager_cache), 8)
        assert torch.equal(torch.cat(got), torch.cat(eager))
        assert cache.lengths == eager_cache.lengths == [n_prompt + 8] * 2


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_generation_with_a_graph_gives_the_same_tokens(cuda, kind, monkeypatch):
    """With refilled rows, and free rows that run past their end."""
    graphs = []

    def make_and_count(model, cache):
        graphs.append(make_graph(model, cache))
        return graphs[-1]

    monkeypatch.setattr(generator, "DecodeGraph", make_and_count)
    model = tiny_model(kind, loop_count=2)
    prompts = ["once", "upon a time", "", "there", "was a"]

    def generate(on_gpu: bool, **options) -> list[list[int]]:
        options = {"max_gen_len": 12, "max_tokens": 60, **options}
        cfg = generator.PackedCausalTransformerGeneratorArgs(**options)
        monkeypatch.setattr(cfg, "uses_graph", lambda device: on_gpu, raising=False)
        args = (cfg, model, ByteTokenizer())
        return [
            c.tokens for c in generator.PackedCausalTransformerGenerator(*args).complete(prompts)
        ]

    assert generate(True) == generate(False)
    assert len(graphs) == 1 and graphs[0].cache.batch_size == 2
    generate(True, max_gen_len=1)
    assert len(graphs) == 1, "captured a graph that is never replayed"


def test_nan_logits_of_a_graph_are_an_error(cuda, monkeypatch):
    """In the step that computes them, not a later one."""
    monkeypatch.setattr(generator, "DecodeGraph", make_graph)
    model = tiny_model("hybrid", loop_count=2)
    cfg = generator.PackedCausalTransformerGeneratorArgs(max_gen_len=6, max_tokens=60)
    monkeypatch.setattr(cfg, "uses_graph", lambda device: True, raising=False)
    made = generator.PackedCausalTransformerGenerator(cfg, model, ByteTokenizer())
    tokens = next(made.complete(["once"])).tokens
    third = tokens[2]
    assert third not in tokens[:2] and third not in b"once", "the test needs a new token"
    model.tok_embeddings.weight[third] = float("nan")  # only an input of the third step
    texts: list[str] = []
    with pytest.raises(UserError, match="NaN"):
        list(made.complete(["once"], on_text=lambda _, text: texts.append(text)))
    assert len("".join(texts).encode()) <= 3


def test_a_full_cache_is_an_error_and_stays_unchanged(cuda):
    model = tiny_model("hybrid", loop_count=1)
    cache = model.init_cache(1, 4)
    graph = make_graph(model, cache)
    model.prefill(torch.randint(258, (1, 4)), cache)
    before = contents(cache)
    with pytest.raises(UserError, match="max_seqlen=4"):
        graph.step(torch.zeros(1, 1, dtype=torch.int64))
    torch.testing.assert_close(contents(cache), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_random_cache_contents_work_as_a_past(kind):
    """Steps after it run, continue its lengths, and read it."""
    model = tiny_model(kind, loop_count=2)
    cache = model.init_cache(2, 12)
    token = torch.full((2, 1), 65)
    empty_logits = model.step(token, cache)
    cache.fill_randomly(9)
    assert cache.lengths == [9, 9]
    past = contents(cache)
    assert not any(torch.equal(a, torch.zeros_like(a)) for a in past if a.numel())
    logits = model.step(token, cache)
    assert logits.isfinite().all()
    assert not torch.allclose(logits, empty_logits, atol=1e-3)
    assert cache.lengths == [10, 10]
    for mixer in (mixer for loop in cache.mixers for mixer in loop):
        if getattr(mixer, "length_B", None) is not None:
            assert mixer.length_B.tolist() == [10, 10]
    with pytest.raises(AssertionError, match="13 tokens in 12 slots"):
        cache.fill_randomly(13)


@pytest.mark.parametrize("kind", [*MIXERS, "window"])  # hybrids have the blocks of two
def test_a_compiled_step_has_no_graph_break(kind):
    """And no sync: compiled steps and CUDA graphs need both."""
    torch._dynamo.reset()
    model = tiny_model(kind, loop_count=2)
    cache, plain_cache = model.init_cache(2, 12), model.init_cache(2, 12)
    token = torch.full((2, 1), 65)
    want = [model.step(token, plain_cache) for _ in range(3)]
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    for block in model.layers:
        block.step = torch.compile(block.step, dynamic=False, fullgraph=True, backend=backend)
    got = [model.step(token, cache) for _ in range(3)]
    torch.testing.assert_close(got, want)
    families = {(s.mixer, s.window) for loop in tiny_args(kind, 2).layout() for s in loop}
    assert len(graphs) == len(families)  # shared by all layers, loops and steps
    torch._dynamo.reset()
