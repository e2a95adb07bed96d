"""DeepSeek sparse attention on CUDA in bf16 against the definition in fp32.

bf16 and fp32 may choose different keys if scores nearly tie, so the definition gets the choice made
in bf16. A separate test checks the choice.
"""

from __future__ import annotations

import math

import pytest
import torch

from apps.LT2.inference.cuda_graph import on_side_stream
from apps.LT2.kernel.dsa import Index, blocks, dsa, dsa_step, triton_index
from apps.LT2.kernel.dsa.naive import dsa_naive
from apps.LT2.kernel.dsa.operator import _backward, _forward
from apps.LT2.kernel.dsa.selection import mask_bytes, select_top_k, unpack_bits
from apps.LT2.mixers import Prompts
from apps.LT2.mixers.dsa import DSAArgs, SparseAttention
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.optim import is_matrix
from tests.tolerances import BF16_KERNEL, BF16_LAYER, FP32, FP32_GRAD, FP64, assert_same

pytestmark = pytest.mark.gpu

NAMES = ("q", "k", "v", "index.q", "index.k", "index.w")


@pytest.fixture
def poisoned_memory():
    """Fill torch.empty with NaN, so unwritten parts cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(B, T, *, H=4, G=2, K=64, J=4, C=64, S=None, dtype=torch.bfloat16):
    torch.manual_seed(0)
    S = S or T
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, J, C), (B, S, C)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs.append(torch.randn(B, T, J) / (J * C) ** 0.5)
    return [x.cuda().requires_grad_() for x in inputs]


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def run(inputs, impl="auto", **options):
    q, k, v, *index = inputs
    return dsa(q, k, v, Index(*index), with_loss=True, impl=impl, **options)


@torch.no_grad()
def choice_of(inputs, impl, top_k, cu_seqlens=None):
    """Return the keys that the operator selects, (B, T, S) bool."""
    _, _, bits, *_ = _forward(*inputs, cu_seqlens, top_k, False, True, impl == "triton")
    return unpack_bits(bits, inputs[1].shape[1])


def gradients(o, loss, inputs):
    torch.manual_seed(1)
    probe = torch.randn(o.shape).bfloat16().to(o)
    n_queries = o.shape[:2].numel()
    return torch.autograd.grad((o * probe).float().sum() + n_queries * loss, inputs)


@pytest.fixture(params=["triton", "blocked"])
def impl(request):
    return request.param


def assert_equals_naive(inputs, impl, *, top_k, cu_seqlens=None):
    exact = [x.detach().float().requires_grad_() for x in inputs]
    selected = None
    if top_k is not None and top_k < inputs[1].shape[1]:
        selected = choice_of(inputs, impl, top_k, cu_seqlens)
    o, loss = run(inputs, impl, top_k=top_k, cu_seqlens=cu_seqlens)
    q, k, v, *index = exact
    want_o, want_loss = dsa_naive(
        q,
        k,
        v,
        Index(*index),
        top_k=top_k,
        cu_seqlens=cu_seqlens,
        with_loss=True,
        selected=selected,
    )
    assert o.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_same(o, want_o, BF16_KERNEL, "o")
    assert_same(loss, want_loss, FP32_GRAD, "loss")  # scores and logits are sums in fp32
    got, want = gradients(o, loss, inputs), gradients(want_o, want_loss, exact)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_same(a, b, BF16_KERNEL, f"gradient of {name}")


@pytest.fixture
def small_blocks(monkeypatch):
    """Use several blocks of queries at the lengths of these tests."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2**17)


@pytest.mark.usefixtures("poisoned_memory", "small_blocks")
@pytest.mark.parametrize("top_k", [None, 1, 33, 100])
@pytest.mark.parametrize("T", [1, 63, 65, 200, 1001])
def test_bf16_equals_naive(T, top_k, impl):
    assert_equals_naive(make_inputs(2, T), impl, top_k=top_k)


@pytest.mark.usefixtures("poisoned_memory", "small_blocks")
@pytest.mark.parametrize(
    "shape",
    [
        {"H": 4, "G": 4, "K": 128},
        {"H": 4, "G": 1, "J": 1, "C": 32},
        {"H": 3, "G": 1, "K": 96},
        {"H": 2, "G": 2, "K": 256},
    ],
)
def test_bf16_equals_naive_in_other_shapes(shape, impl):
    assert_equals_naive(make_inputs(1, 333, **shape), impl, top_k=50)


@pytest.mark.usefixtures("poisoned_memory", "small_blocks")
@pytest.mark.parametrize("top_k", [None, 20])
def test_bf16_equals_naive_on_packed_documents(top_k, impl):
    lengths = (1, 63, 0, 65, 200, 64, 0)
    inputs = make_inputs(1, sum(lengths))
    assert_equals_naive(inputs, impl, top_k=top_k, cu_seqlens=packed(lengths))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("documents", [None, (100, 233)], ids=["dense", "packed"])
def test_more_keys_than_a_program_holds(monkeypatch, documents):
    """Blocks with few keys choose in the kernel, later ones in torch, with the same result."""
    cu_seqlens = None if documents is None else packed(documents)
    inputs = make_inputs(1, 333)
    want = run(inputs, "triton", top_k=50, cu_seqlens=cu_seqlens)
    want_choice = choice_of(inputs, "triton", 50, cu_seqlens)
    monkeypatch.setattr(triton_index, "MAX_CHOICE", 200)
    assert torch.equal(choice_of(inputs, "triton", 50, cu_seqlens), want_choice)
    got = run(inputs, "triton", top_k=50, cu_seqlens=cu_seqlens)
    assert torch.equal(got[0], want[0])
    assert_same(got[1], want[1], FP32)


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45])
def test_scores_of_every_kind_are_in_order(special):
    """The search over bits handles ties, both zeros and infinities."""
    torch.manual_seed(0)
    B, T, top_k = 2, 700, 100
    scores = torch.randn(B, T, T, device="cuda").round(decimals=1)
    scores[torch.rand_like(scores) < 0.3] = special
    scores[torch.rand_like(scores) < 0.1] *= -1
    visible = torch.ones(T, T, dtype=torch.bool, device="cuda").tril()
    want = select_top_k(scores, visible, top_k)
    bits = torch.zeros(B, T, mask_bytes(T), dtype=torch.uint8, device="cuda")
    log_sum = torch.empty(B, T, device="cuda")
    start = torch.zeros(T, dtype=torch.int32, device="cuda")
    triton_index._select_kernel[T, B](
        scores,
        bits,
        log_sum,
        start,
        0,
        T,
        T,
        bits.shape[-1],
        top_k,
        BYTES=128,
        KEYS_LOG2=10,
        num_warps=1,
    )
    assert torch.equal(unpack_bits(bits, T), want)
    if not math.isinf(special):
        assert_same(log_sum, scores.masked_fill(~want, float("-inf")).logsumexp(-1), FP32)


def test_fp32_equals_naive():
    inputs = make_inputs(2, 200, dtype=torch.float32)
    for top_k in (None, 300):
        results = [run(inputs, impl, top_k=top_k) for impl in ("auto", "naive")]
        for got, want in zip(*results, strict=True):
            assert_same(got, want, FP32)
        grads = [gradients(*result, inputs) for result in results]
        for name, got, want in zip(NAMES, *grads, strict=True):
            assert_same(got, want, FP32_GRAD, name)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("weights", ["random", "zero"])
def test_the_choice_equals_the_definition_except_near_ties(weights, impl):
    inputs = make_inputs(2, 700)
    with torch.no_grad():
        inputs[5] *= weights == "random"
    q, k, v, *index = [x.detach().double() for x in inputs]
    selected = choice_of(inputs, impl, 100)
    seen = torch.arange(1, 701, device="cuda").clamp(max=100)
    assert torch.equal(selected.sum(-1), seen.expand(2, -1))
    scores = torch.einsum("btjc,bsc->btjs", index[0], index[1]).relu()
    scores = torch.einsum("btjs,btj->bts", scores, index[2])
    visible = torch.ones(700, 700, dtype=torch.bool, device="cuda").tril()
    weakest = scores.masked_fill(~selected, torch.inf).amin(-1, keepdim=True)
    better = visible & ~selected & (scores > weakest + 1e-4 * scores.abs().amax())
    assert not better.any()
    if weights == "zero":  # all equal: the last 100 keys
        last = visible & ~visible.tril(-100)
        assert torch.equal(selected, last.expand(2, -1, -1))


def test_kernels_and_plain_torch_repeat_to_the_bit(impl):
    inputs = make_inputs(2, 333)
    results = [run(inputs, impl, top_k=50) for _ in range(2)]
    grads = [gradients(*result, inputs) for result in results]
    for a, b in zip(results[0] + grads[0], results[1] + grads[1], strict=True):
        assert torch.equal(a, b)


def test_queries_may_be_the_last_of_the_tokens():
    q, k, v, index_q, index_k, w = make_inputs(2, 200)
    want, _ = run((q, k, v, index_q, index_k, w), top_k=50)
    late = [x[:, 130:] for x in (q, index_q, w)]
    got, _ = run((late[0], k, v, late[1], index_k, late[2]), top_k=50)
    want = want[:, 130:].float()
    apart = (got.float() - want).norm(dim=(-1, -2)) > 0.02 * want.norm(dim=(-1, -2))
    assert apart.float().mean() < 0.05  # queries with a near tie may choose differently


def test_peak_memory_is_below_one_matrix_of_scores(impl):
    """Run 16 heads at 4096 tokens, forward and backward; dense fp32 scores would take 1 GiB."""
    run(make_inputs(1, 64), impl, top_k=8)  # cuBLAS allocates its workspace
    inputs = make_inputs(1, 4096, H=16, G=16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, loss = run(inputs, impl, top_k=2048)
    kept = torch.cuda.memory_allocated() - before
    torch.autograd.grad(o.float().sum() + loss, inputs)
    peak = torch.cuda.max_memory_allocated() - before
    dense = 4 * 16 * 4096**2
    assert peak < dense / 1.5, f"{peak / 2**20:.0f} MiB"
    # Kept for backward: the output, one bit per pair, the loss's gradients, and the log-sum-exp of
    # each query and head.
    assert kept < 2**20 * (8 + 2 + 3 + 0.25) * 1.2, f"{kept / 2**20:.1f} MiB"


@pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
def test_block_compiles_whole(documents):
    """Forward and backward are one graph each, with eager's results."""
    cu_seqlens = None if documents is None else packed(documents)
    inputs = make_inputs(1, 200)

    def block(q, *rest):
        o, loss = run((q * 2, *rest), top_k=30, cu_seqlens=cu_seqlens)
        return torch.nn.functional.silu(o), loss

    want = block(*inputs)
    torch.compiler.reset()
    got = torch.compile(block, fullgraph=True)(*inputs)
    pairs = [*zip(got, want, strict=True)]
    pairs += zip(gradients(*got, inputs), gradients(*want, inputs), strict=True)
    for a, b in pairs:
        assert_same(a, b, BF16_KERNEL)  # a fused silu does not round its input


@pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
def test_operator_is_registered_well(documents, impl):
    cu_seqlens = None if documents is None else packed(documents)
    inputs = make_inputs(1, 200)
    options = (cu_seqlens, 30, True, True, impl == "triton")
    torch.library.opcheck(_forward, (*inputs, *options))
    with torch.no_grad():
        o, lse, bits, *_ = _forward(*inputs, *options)
    saved = (*(x.detach() for x in inputs[:3]), o, lse, bits, cu_seqlens, o)
    torch.library.opcheck(_backward, saved, test_utils=("test_schema", "test_faketensor"))


# ---- decode


def test_step_equals_the_last_query_in_fp64():
    q, k, v, index_q, index_k, w = [
        x.detach().double() for x in make_inputs(3, 60, dtype=torch.float32)
    ]
    want, _ = run((q, k, v, index_q, index_k, w), top_k=7)
    for t in (0, 6, 7, 59):
        index = Index(index_q[:, t : t + 1], index_k, w[:, t : t + 1])
        n_valid = torch.full((3,), t + 1, device="cuda")
        got = dsa_step(q[:, t], k, v, index, n_valid, top_k=7)
        assert_same(got, want[:, t], FP64, f"token {t}")


def make_mixer(top_k: int) -> SparseAttention:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=128, n_layers=1, n_heads=2, vocab_size=8, gated_attn=True, dsa=DSAArgs(top_k)
    )
    mixer = SparseAttention(args, args.dsa).cuda()
    mixer.reset_parameters(None, 1.0)
    for name, p in mixer.named_parameters():
        if is_matrix(name, p):
            p.data = p.data.bfloat16()
    return mixer.requires_grad_(False)


@pytest.mark.parametrize("top_k", [8, 100])
def test_step_in_a_cuda_graph_equals_eager_steps(top_k):
    mixer = make_mixer(top_k)
    x = torch.randn(3, 40, 128, device="cuda").bfloat16()
    eager, captured = (mixer.init_cache(3, 40, like=x) for _ in range(2))
    mixer.prefill(x[:, :20], eager, Prompts())
    want = torch.cat([mixer.step(x[:, t : t + 1], eager) for t in range(20, 40)], 1)

    token = x[:, :1].clone()
    with on_side_stream():
        mixer.step(token, captured)  # warm up; the cache is reset below
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = mixer.step(token, captured)
    captured.reset()
    mixer.prefill(x[:, :20], captured, Prompts())
    got = []
    for t in range(20, 40):
        token.copy_(x[:, t : t + 1])
        graph.replay()
        got.append(output.clone())
    assert torch.equal(torch.cat(got, 1), want)
    if top_k >= 40:  # with a choice of keys, near ties may differ
        assert_same(want, mixer(x)[:, 20:], BF16_LAYER)
