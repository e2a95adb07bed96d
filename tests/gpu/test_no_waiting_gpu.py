"""Prefill, steps, training and generation do not sync with the device; CUDA checks it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch

from apps.LT2.batch import to_device
from apps.LT2.inference.compiled import compiled_for_generation
from apps.LT2.inference.cuda_graph import DecodeGraph
from apps.LT2.kernel.documents import upload_cu_seqlens
from apps.LT2.mixers.attention import append
from lingua.errors import UserError
from lingua.optim import OptimArgs, build_optimizer, step_if
from lingua.parallel.gradients import clip_grad_norm_
from lingua.parallel.parallelize import compile_blocks
from tests.gpu.test_decode_graph_gpu import CHOOSE_KEYS, make_generator, make_model
from tests.LT2.tiny import KINDS, tiny_model
from tests.tolerances import BF16_KERNEL, relative_error

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make every copy and operator that syncs with the device raise a RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def prefill_of(model, *, packed: bool):
    """Return a prefill into rows of an empty cache, as in the generator, and the cache."""
    cache = model.init_cache(3, 200)
    shape = (1, 170) if packed else (3, 70)
    tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).cuda()

    def prefill():
        cache.reset([0, 1, 2])
        # New cu_seqlens for each call, as for each batch of prompts.
        cu_seqlens = upload_cu_seqlens([0, 70, 71, 170], "cuda") if packed else None
        return model.prefill(tokens, cache, cu_seqlens=cu_seqlens, rows=[2, 0, 1], last_only=True)

    return prefill, cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_prefill_and_steps_do_not_sync(kind, packed):
    model = make_model(kind)
    prefill, cache = prefill_of(model, packed=packed)
    token = torch.full((3, 1), 65, device="cuda")
    want = prefill().clone()  # loads and tunes kernels, with syncs
    model.step(token, cache)
    with no_waiting():
        got = prefill()
    assert relative_error(got, want) <= BF16_KERNEL
    with no_waiting():
        model.step(token, cache)
        cache.reset([1])
        cache.copy_rows([1], cache, [2])


TRAINED = [(kind, doc_mask, False) for kind in KINDS for doc_mask in (False, True)]
TRAINED += [(kind, True, True) for kind in ("gdn", "mamba2", "gla", "nsa", "hybrid")]


@pytest.mark.parametrize("kind, doc_mask, compiled", TRAINED)
def test_forward_and_backward_do_not_sync(kind, doc_mask, compiled):
    model = make_model(kind).requires_grad_(True)
    if compiled:
        torch.compiler.reset()
        compile_blocks(list(model.layers), 8, 2)
    views = torch.randint(256, (2, 100, 3), generator=torch.Generator().manual_seed(0)).numpy()

    def run(first: int) -> None:
        views[..., -1] = 0
        views[0, [0, first, 70], -1] = 1  # document starts
        n_targets = torch.full((), 200.0, device="cuda")
        model(*to_device(views, doc_mask, n_targets.device), n_targets).backward()

    run(66)  # loads and tunes kernels, with syncs
    run(67)  # allocates gradients
    with no_waiting():
        run(68)


def test_an_update_does_not_sync_and_a_nan_changes_nothing():
    model = tiny_model("gdn", 2).cuda().requires_grad_(True)
    assert model.rho is not None
    args, rows = OptimArgs(warmup=0), {model.rho: lambda: 1}
    optimizer, _ = build_optimizer(model, args, 10, used_rows=rows)

    def update(gradient: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        step_if(clip_grad_norm_(model, 1.0).isfinite(), optimizer)

    update(1.0)  # allocates the state
    with no_waiting():
        update(2.0)
    assert optimizer.state[model.rho]["step"].tolist() == [2, 0]
    want = deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with no_waiting():
        update(float("nan"))
    got = (model.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["full", "window", "gdn", "hybrid"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_prefill_does_not_sync(kind, packed):
    torch.compiler.reset()
    model = make_model(kind)
    prefill, _ = prefill_of(model, packed=packed)
    with compiled_for_generation(model, prefill=True):
        want = prefill().clone()
        with no_waiting():
            got = prefill()
    assert relative_error(got, want) <= BF16_KERNEL


def test_a_prefill_in_chunks_does_not_sync():
    """Long prompts are read in chunks."""
    model = make_model("full")
    cache = model.init_cache(2, 100)
    tokens = torch.randint(256, (2, 90), device="cuda")
    for part in range(2):
        cache.reset()
        if part == 0:
            for chunk in tokens.split(30, dim=1):
                model.prefill(chunk, cache, last_only=True)
            continue
        with no_waiting():
            for chunk in tokens.split(30, dim=1):
                model.prefill(chunk, cache, last_only=True)


def test_a_ring_buffer_holds_the_last_tokens():
    """Tokens that share a slot all write the value of the last of them."""
    torch.manual_seed(0)
    new = torch.randn(1, 5000, 2, 8, device="cuda")
    lengths = torch.tensor([4000, 1000], device="cuda")
    slots = torch.zeros(2, 16, 2, 8, device="cuda")
    length_B = torch.zeros(2, dtype=torch.int64, device="cuda")
    append([(new, slots)], length_B, torch.tensor([1, 0], device="cuda"), lengths)
    for row, end, n in ((1, 4000, 4000), (0, 5000, 1000)):
        kept = new[0, end - 16 : end]
        positions = torch.arange(n - 16, n, device="cuda") % 16
        assert torch.equal(slots[row, positions], kept)


@pytest.mark.parametrize("graph", [False, None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_of_generation_syncs_once(graph, temperature, monkeypatch):
    """With warm kernels, a step syncs for its tokens only."""
    model = make_model("hybrid")
    options = {"max_gen_len": 12, "max_tokens": 90, "temperature": temperature, "top_p": 0.9}
    generator = make_generator(model, reduce_generation_overhead=graph, **options)

    def tokens() -> list[list[int]]:
        done = generator.complete(["once", "upon a time"], num_samples=5, score=False)
        return [completion.tokens for completion in done]

    want = tokens()
    tolist = torch.Tensor.tolist
    n_fetched = 0

    def fetch(self):
        nonlocal n_fetched
        n_fetched += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(self)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    prepare = DecodeGraph.__init__

    def capture(self, *args):  # once per batch, with syncs
        torch.cuda.set_sync_debug_mode("default")
        prepare(self, *args)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.Tensor, "tolist", fetch)
    monkeypatch.setattr(DecodeGraph, "__init__", capture)
    with no_waiting():
        got = tokens()
    assert got == want
    # Ten answers in three rows of 24 slots: four prefills with eleven steps each.
    assert n_fetched == 4 * 12


@pytest.mark.parametrize("graph", [False, None])
def test_non_finite_logits_of_a_step_are_reported(graph):
    model = make_model("hybrid")
    generator = make_generator(
        model, max_gen_len=8, max_tokens=60, reduce_generation_overhead=graph
    )
    tokens = next(iter(generator.complete(["once"], score=False))).tokens
    fed = next(i for i in range(1, 7) if tokens[i] not in [*tokens[:i], *b"once", 256, 0])
    with torch.no_grad():
        model.tok_embeddings.weight[tokens[fed]] = float("nan")
    with pytest.raises(UserError, match="logits"):
        list(generator.complete(["once"], score=False))
    assert torch.zeros(1, device="cuda").item() == 0, "the device has met an assertion"


@pytest.mark.parametrize("graph", [False, None])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CHOOSE_KEYS])
def test_samples_of_a_copied_row_equal_samples_of_the_prompt(kind, graph):
    """Copies are exact: greedy samples of a prompt are equal, in refilled rows too."""
    model = make_model(kind)
    options = {"max_gen_len": 32, "reduce_generation_overhead": graph}
    prompt = list(range(40, 80))
    in_two_rows = make_generator(model, max_tokens=2 * 72, **options)
    answers = [c.tokens for c in in_two_rows.complete([prompt], num_samples=5, score=False)]
    assert len(answers) == 5 and all(tokens == answers[0] for tokens in answers)
    alone = next(iter(make_generator(model, max_tokens=72, **options).complete([prompt])))
    assert alone.tokens[0] == answers[0][0]
