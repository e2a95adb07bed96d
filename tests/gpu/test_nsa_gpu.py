"""Native sparse attention on CUDA: our kernels against the definition.

The choice of blocks is discrete: rounding in bf16 may swap blocks of nearly equal importance. So
inputs rank blocks by a wide margin, or all blocks are chosen, or both forms get one choice.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apps.LT2.inference.cuda_graph import on_side_stream
from apps.LT2.kernel.attention import attention
from apps.LT2.kernel.documents import local_positions
from apps.LT2.kernel.nsa import (
    block_means,
    naive,
    native_sparse_attention,
    native_sparse_attention_step,
)
from apps.LT2.kernel.nsa import triton as kernels
from apps.LT2.kernel.nsa.blocks import cut_blocks, mean_of_blocks
from apps.LT2.mixers.nsa import NativeSparseAttention, NSAArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.errors import UserError
from tests.gpu.kernel_cases import packed
from tests.tolerances import BF16_KERNEL, BF16_LAYER, FP32, assert_same

pytestmark = pytest.mark.gpu

H, G = 32, 2
NAMES = ("q", "k", "v", "gates")
SIZES = {"block_size": 32, "n_blocks": 8, "window_size": 50}
DOCUMENTS = (1, 63, 0, 65, 400, 64, 0, 0, 7)


@pytest.fixture
def poisoned_memory():
    """Fill torch.empty with NaN, so an output that a kernel does not write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(B, T, K=64, *, heads=H, groups=G, block_size=32, cu_seqlens=None):
    """Make q, k, v and gates in bf16 on the GPU, all requiring gradients.

    Each group ranks its blocks in a random order, along a direction that all queries share.
    Neighbours in that order differ by about 0.1 in the scores of every head.
    """
    torch.manual_seed(0)
    direction = F.normalize(torch.randn(K), dim=0)
    block_T = local_positions(T, None if cu_seqlens is None else cu_seqlens.cpu(), "cpu")
    block_T = block_T // block_size
    n_places = T // block_size + 1
    place = torch.stack([torch.randperm(n_places) for _ in range(groups)]) - n_places / 2
    k = 0.3 * torch.randn(B, T, groups, K) + 0.2 * place[:, block_T].T[..., None] * direction
    q = 0.3 * torch.randn(B, T, heads, K) + 0.5 * K**0.5 * direction
    inputs = [q, k, torch.randn(B, T, groups, K), torch.rand(B, T, heads, 3)]
    return [x.bfloat16().cuda().requires_grad_() for x in inputs]


def run(inputs, impl, *, cu_seqlens=None, **sizes):
    return native_sparse_attention(*inputs, **(SIZES | sizes), cu_seqlens=cu_seqlens, impl=impl)


def loss_of(o):
    """Project o on random bf16 numbers, which add no rounding error."""
    torch.manual_seed(1)
    return (o.float() * torch.randn(o.shape).bfloat16().to(o)).sum()


def tables_of(T, block_size, cu_seqlens):
    """Return the blocks, and the operators' tables: first, own and seen block of each token."""
    blocks = cut_blocks(T, block_size, cu_seqlens, "cuda")
    return blocks, kernels.blocks_of_queries(blocks, T, T)


def exact_copies(inputs):
    return [x.detach().float().requires_grad_() for x in inputs]


def assert_kernel_is_right(inputs, **options):
    exact = exact_copies(inputs)
    o, want_o = run(inputs, "triton", **options), run(exact, "naive", **options)
    assert o.dtype == torch.bfloat16
    assert_same(o, want_o, BF16_KERNEL, "o")
    got = torch.autograd.grad(loss_of(o), inputs)
    want = torch.autograd.grad(loss_of(want_o), exact)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert_same(a, b, BF16_KERNEL, f"gradient of {name}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 200, 700])
def test_kernel_equals_naive(T):
    assert_kernel_is_right(make_inputs(2, T))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "T, sizes",
    [
        (700, {"block_size": 16, "n_blocks": 8}),
        (200, {"block_size": 16, "n_blocks": 5}),
        (700, {"block_size": 8, "n_blocks": 6}),  # more means than a tile has
        (700, {"block_size": 80, "n_blocks": 4}),  # a block is longer than a tile
        (1500, {"block_size": 64, "n_blocks": 16, "window_size": 512}),  # the defaults
    ],
)
def test_kernel_equals_naive_at_other_sizes(T, sizes):
    assert_kernel_is_right(make_inputs(1, T, block_size=sizes["block_size"]), **sizes)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "K, heads, groups",
    [(16, 16, 1), (96, 32, 2), (128, 32, 1), (256, 16, 1), (8, 4, 2), (64, 24, 1), (64, 3, 3)],
)
def test_kernel_equals_naive_at_other_head_dims(K, heads, groups):
    assert_kernel_is_right(make_inputs(2, 300, K, heads=heads, groups=groups))


@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_equals_naive_on_packed_documents():
    cu_seqlens = packed(DOCUMENTS)
    inputs = make_inputs(1, sum(DOCUMENTS), cu_seqlens=cu_seqlens)
    assert_kernel_is_right(inputs, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("lengths", [None, DOCUMENTS], ids=["dense", "packed"])
def test_kernel_equals_naive_when_all_blocks_are_chosen(lengths):
    T = 200 if lengths is None else sum(lengths)
    cu_seqlens = None if lengths is None else packed(lengths)
    torch.manual_seed(0)
    shapes = ((1, T, H, 64), (1, T, G, 64), (1, T, G, 64))
    inputs = [torch.randn(shape) for shape in shapes] + [torch.rand(1, T, H, 3)]
    inputs = [x.bfloat16().cuda().requires_grad_() for x in inputs]
    assert_kernel_is_right(inputs, n_blocks=16, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("lengths", [None, DOCUMENTS], ids=["dense", "packed"])
def test_kernel_chooses_the_same_blocks_as_the_definition(lengths):
    """The chosen sets are equal; each block is chosen once, and -1 fills unused slots."""
    lengths = (600,) if lengths is None else lengths
    T, cu_seqlens = sum(lengths), packed(lengths)
    size, n_blocks = 16, 5
    inputs = make_inputs(1, T, block_size=size, cu_seqlens=cu_seqlens)
    q, k = (x.detach() for x in inputs[:2])
    offsets = None if len(lengths) == 1 else cu_seqlens
    blocks, tables = tables_of(T, size, offsets)
    means = mean_of_blocks(k, blocks, packed=offsets is not None)
    _, _, got = kernels._compressed(q, means, means, *tables, n_blocks)
    assert got.shape == (1, T, G, n_blocks)

    ends = cu_seqlens.tolist()
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        if start == end:
            continue
        q_TGRK = q[0, start:end].float().unflatten(1, (G, -1))
        keys = k[0, start:end].float()
        _, importance = naive.compressed_attention(q_TGRK, keys, keys, size)
        want = naive.chosen_blocks(importance, end - start, size, n_blocks)
        for t, heads in enumerate(got[0, start:end].tolist()):
            for g, blocks in enumerate(heads):
                chosen = sorted(b for b in blocks if b >= 0)
                assert chosen == sorted(want[t][g]), f"query {start + t}, group {g}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [None, DOCUMENTS], ids=["dense", "packed"])
def test_selected_attention_reads_the_given_blocks(lengths):
    """The choice is random, in random order, with gaps of -1."""
    offsets = None if lengths is None else packed(lengths)
    lengths = (300,) if lengths is None else lengths
    T, size = sum(lengths), 32
    torch.manual_seed(0)
    choices = []
    for n in lengths:
        choices.append([])
        for t in range(n):
            own = t // size
            others = [
                [b for b in torch.randperm(own).tolist() if torch.rand(1) < 0.5][:7]
                for _ in range(G)
            ]
            choices[-1].append([[own, *blocks] for blocks in others])
    chosen = torch.full((1, T, G, 8), -1, dtype=torch.int32)
    flat = [heads for document in choices for heads in document]
    for t, heads in enumerate(flat):
        for g, blocks in enumerate(heads):
            slots = torch.randperm(8)[: len(blocks)]
            chosen[0, t, g, slots] = torch.tensor(blocks, dtype=torch.int32)

    inputs = [torch.randn(1, T, n, 64).bfloat16().cuda().requires_grad_() for n in (H, G, G)]
    exact = exact_copies(inputs)
    blocks, (first_T, _, _) = tables_of(T, size, offsets)
    tables = (first_T, blocks.start_C.int(), blocks.length_C.int())
    o, _ = kernels._selected(*inputs, chosen.cuda(), *tables, size)
    q, k, v = (x[0] for x in exact)
    documents, start = [], 0
    for n, choice in zip(lengths, choices, strict=True):
        span = slice(start, start := start + n)
        q_TGRK = q[span].unflatten(1, (G, -1))
        documents.append(naive.selected_attention(q_TGRK, k[span], v[span], choice, size))
    want = torch.cat(documents).flatten(1, 2)[None]
    assert_same(o, want, BF16_KERNEL, "o")
    got_grads = torch.autograd.grad(loss_of(o), inputs)
    want_grads = torch.autograd.grad(loss_of(want), exact)
    for name, a, b in zip(NAMES, got_grads, want_grads, strict=False):
        assert_same(a, b, BF16_KERNEL, f"gradient of {name}")


@pytest.mark.parametrize("n_past", [1, 64, 150, 299])
def test_queries_that_continue_a_past_equal_naive(n_past):
    q, k, v, gates = (x.detach() for x in make_inputs(2, 300))
    inputs = [q[:, n_past:], k, v, gates[:, n_past:]]
    assert_kernel_is_right([x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("lengths", [None, DOCUMENTS], ids=["dense", "packed"])
def test_results_repeat_to_the_bit(lengths):
    T = 700 if lengths is None else sum(lengths)
    cu_seqlens = None if lengths is None else packed(lengths)
    *inputs, _ = make_inputs(1, T, cu_seqlens=cu_seqlens)
    options = {"block_size": 32, "n_blocks": 8, "cu_seqlens": cu_seqlens}
    results = []
    for _ in range(2):
        branches = torch.stack(kernels.sparse_branches_triton(*inputs, **options))
        results.append((branches, *torch.autograd.grad(loss_of(branches), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_views_of_a_fused_projection():
    """Views of one tensor are strided, and so is the gradient of o."""
    inputs = make_inputs(2, 65)
    heads = torch.cat(inputs[:3], dim=2).detach().requires_grad_()
    o = run([*heads.split([H, G, G], dim=2), inputs[3]], "triton")
    want_o = run(inputs, "triton")
    weight = torch.randn(2, H, 65, 64, device="cuda").transpose(1, 2).bfloat16()
    (got,) = torch.autograd.grad((o * weight).sum(), heads)
    want = torch.autograd.grad((want_o * weight).sum(), inputs[:3])
    assert torch.equal(o, want_o)
    assert_same(got, torch.cat(want, dim=2), BF16_KERNEL)  # q and k also get the window's gradient


def test_cu_seqlens_overwritten_in_place():
    """New content needs new tables."""
    buffer = packed((100, 28))
    run(make_inputs(1, 128, cu_seqlens=buffer), "triton", cu_seqlens=buffer)
    buffer.copy_(packed((30, 98)))
    inputs = make_inputs(1, 128, cu_seqlens=buffer)
    assert_kernel_is_right(inputs, cu_seqlens=buffer)
    with torch.inference_mode():
        buffer = packed((100, 28))
        run(inputs, "triton", cu_seqlens=buffer)
        buffer.copy_(packed((30, 98)))
        o, want = (run(inputs, impl, cu_seqlens=buffer) for impl in ("triton", "naive"))
    assert_same(o, want, BF16_KERNEL, "o under inference mode")


@pytest.mark.parametrize("lengths", [None, (1, 63, 136)], ids=["dense", "packed"])
def test_block_compiles_whole(lengths):
    """Forward and backward are one graph each, with eager's results."""
    cu_seqlens = None if lengths is None else packed(lengths)
    inputs = make_inputs(1, 200, cu_seqlens=cu_seqlens)

    def block(q, *others):
        return F.silu(run((q * 2, *others), "auto", cu_seqlens=cu_seqlens))

    want = block(*inputs)
    torch.compiler.reset()
    got = torch.compile(block, fullgraph=True)(*inputs)
    want_grads = torch.autograd.grad(loss_of(want), inputs)
    got_grads = torch.autograd.grad(loss_of(got), inputs)
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert_same(a, b, BF16_KERNEL)  # a fused silu does not round its input


@pytest.mark.parametrize("lengths", [None, (1, 63, 136)], ids=["dense", "packed"])
def test_operators_are_registered_well(lengths):
    """Check schema, fake shapes, autograd and dynamic shapes with torch's own check."""
    cu_seqlens = None if lengths is None else packed(lengths)
    q, k, v, _ = make_inputs(1, 200, cu_seqlens=cu_seqlens)
    blocks, tables = tables_of(200, 32, cu_seqlens)
    k_means, v_means = (
        mean_of_blocks(x.detach(), blocks, packed=lengths is not None).requires_grad_()
        for x in (k, v)
    )
    checks = ("test_schema", "test_faketensor")
    first_T, _, seen_T = tables
    torch.library.opcheck(kernels._compressed, (q, k_means, v_means, *tables, 5))
    with torch.no_grad():
        o, lse, chosen = kernels._compressed(q, k_means, v_means, *tables, 5)
        saved = (q.detach(), k_means.detach(), v_means.detach(), o, lse, first_T, seen_T, o)
        torch.library.opcheck(kernels._compressed_backward, saved, test_utils=checks)
    given = (chosen, first_T, blocks.start_C.int(), blocks.length_C.int(), 32)
    torch.library.opcheck(kernels._selected, (q, k, v, *given))
    with torch.no_grad():
        o, lse = kernels._selected(q, k, v, *given)
        saved = (q.detach(), k.detach(), v.detach(), o, lse, *given, o)
        torch.library.opcheck(kernels._selected_backward, saved, test_utils=checks)


def test_a_larger_head_dim_names_what_works():
    with pytest.raises(UserError, match=r"at most 256, got 272.*model\.head_dim.*impl='blocked'"):
        run(make_inputs(1, 4, 272), "auto")


def test_auto_computes_fp32_inputs_in_fp32():
    exact = [x.detach().float() for x in make_inputs(2, 200)]
    assert_same(run(exact, "auto"), run(exact, "naive"), FP32)


@torch.no_grad()
def test_step_in_a_cuda_graph_equals_naive():
    T, n_slots, size = 200, 224, 32
    inputs = [x.detach() for x in make_inputs(3, T)]
    want = run([x.float() for x in inputs], "naive")
    k_cache, v_cache = (F.pad(x[:, :150], (0, 0, 0, 0, 0, n_slots - 150)) for x in inputs[1:3])
    cache = (k_cache, v_cache, block_means(k_cache, size), block_means(v_cache, size))
    before = [x.clone() for x in cache]
    token = [x[:, 150].clone() for x in inputs]
    position_B = torch.full((3,), 150, device="cuda")

    def step():
        o = native_sparse_attention_step(*token, cache, position_B, n_blocks=8, window_size=50)
        position_B.add_(1)
        return o

    with on_side_stream():
        step()  # warm up; the cache is reset below
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    for x, was in zip(cache, before, strict=True):
        x.copy_(was)
    position_B.fill_(150)
    got = []
    for t in range(150, T):
        for slot, x in zip(token, inputs, strict=True):
            slot.copy_(x[:, t])
        graph.replay()
        got.append(output.clone())
    assert_same(torch.stack(got, dim=1), want[:, 150:], BF16_KERNEL)


@torch.no_grad()
def test_layer_equals_fla_with_the_same_weights():
    """Compare without the window branch, for which fla needs another package.

    fla rotates halves of a head; we rotate neighbours.
    """
    layers = pytest.importorskip("fla.layers.nsa")
    args = LoopedTransformerArgs(
        dim=128,
        n_heads=H,
        n_kv_heads=G,
        head_dim=64,
        vocab_size=8,
        nsa=NSAArgs(block_size=32, n_blocks=8, window_size=50),
    )
    torch.manual_seed(0)
    ours = NativeSparseAttention(args, args.nsa)
    ours.reset_parameters(None, 1.0)
    ours.wg.weight.normal_(std=0.1)
    ours = ours.cuda().bfloat16()
    theirs = layers.NativeSparseAttention(
        hidden_size=128,
        num_heads=H,
        num_kv_heads=G,
        head_dim=64,
        block_size=32,
        block_counts=8,
        window_size=0,
        rope_theta=args.rope_theta,
    )
    theirs = theirs.cuda().bfloat16()
    halves = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    for to, linear in ((theirs.q_proj, ours.wq), (theirs.k_proj, ours.wk)):
        to.weight.copy_(linear.weight.unflatten(0, (-1, 64))[:, halves].flatten(0, 1))
    theirs.v_proj.weight.copy_(ours.wv.weight)
    theirs.g_proj.weight.copy_(ours.wg.weight)
    theirs.o_proj.weight.copy_(ours.wo.weight)

    x = torch.randn(2, 200, 128).cuda().bfloat16()  # 7 blocks: all chosen
    q, k, v, gates = ours._project(x, torch.arange(200, device="cuda"))
    window = attention(q, k, v, window=50) * gates[..., 2:]
    got = ours(x) - ours.wo(window.flatten(2))
    assert_same(got, theirs(x)[0], BF16_LAYER)
