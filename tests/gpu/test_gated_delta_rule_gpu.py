"""Gated delta rule on CUDA: fla's kernels behind our operator against the definition in fp32.

The first run tunes kernels for minutes; TRITON_CACHE_DIR keeps the choices. So all tests share one
head count and three pairs of key and value width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apps.LT2.kernel.gated_delta_rule import gated_delta_rule, gated_delta_step
from lingua.args import UserError
from tests.tolerances import BF16_KERNEL, FP32, assert_same

pytestmark = pytest.mark.gpu

H = 2
NAMES = ("q", "k", "v", "g", "beta", "state")


@pytest.fixture
def poisoned_memory():
    """torch.empty holds NaN, so an output that a kernel does not write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(B, T, N, K=64, V=64, *, decay=0.2):
    """q, k, v in bf16, g, beta and the states of N sequences in fp32, all asking for gradients."""
    torch.manual_seed(0)
    inputs = [
        F.normalize(torch.randn(B, T, H, K), dim=-1).bfloat16(),
        F.normalize(torch.randn(B, T, H, K), dim=-1).bfloat16(),
        torch.randn(B, T, H, V).bfloat16(),
        -decay * torch.rand(B, T, H),
        2 * torch.rand(B, T, H),
        torch.randn(N, H, K, V),
    ]
    return [x.cuda().requires_grad_() for x in inputs]


def packed(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def run(inputs, impl, *, cu_seqlens=None):
    q, k, v, g, beta, state = inputs
    return gated_delta_rule(q, k, v, g, beta, state=state, cu_seqlens=cu_seqlens, impl=impl)


def loss_of(o, final):
    """A random projection, of numbers that bf16 holds: their rounding is no error of a kernel."""
    torch.manual_seed(1)
    return sum((x.float() * torch.randn(x.shape).bfloat16().to(x)).sum() for x in (o, final))


def assert_kernel_is_right(inputs, *, cu_seqlens=None):
    exact = [x.detach().float().requires_grad_() for x in inputs]
    o, final = run(inputs, "fla", cu_seqlens=cu_seqlens)
    want_o, want_final = run(exact, "naive", cu_seqlens=cu_seqlens)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert_same(o, want_o, BF16_KERNEL, "o")
    assert_same(final, want_final, BF16_KERNEL, "final state")

    got = torch.autograd.grad(loss_of(o, final), inputs)
    want = torch.autograd.grad(loss_of(want_o, want_final), exact)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_same(a, b, BF16_KERNEL, f"gradient of {name}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200, 1000])
def test_kernel_equals_naive(T):
    assert_kernel_is_right(make_inputs(2, T, 2))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("T", [65, 1000])
@pytest.mark.parametrize("K, V", [(96, 192), (128, 128)])
def test_kernel_equals_naive_at_other_widths(K, V, T):
    assert_kernel_is_right(make_inputs(2, T, 2, K, V))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("K, V", [(32, 64), (48, 32), (64, 16)])
def test_widths_under_64_are_right_too(K, V):
    """fla's own gradients are wrong there: they read past the end of q and k."""
    assert_kernel_is_right(make_inputs(2, 200, 2, K, V))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("K, V", [(64, 64), (96, 192)])
def test_kernel_equals_naive_on_packed_documents(K, V):
    lengths = (1, 63, 0, 65, 200, 64, 0)
    inputs = make_inputs(1, sum(lengths), len(lengths), K, V)
    assert_kernel_is_right(inputs, cu_seqlens=packed(lengths))


def test_strong_decay_keeps_gradients_right():
    assert_kernel_is_right(make_inputs(2, 200, 2, decay=20.0))


@pytest.mark.parametrize("used", ["o", "final state"])
def test_one_result_alone_can_be_differentiated(used):
    inputs = make_inputs(2, 65, 2)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    grads = []
    for xs, impl in ((inputs, "fla"), (exact, "naive")):
        result = run(xs, impl)[0 if used == "o" else 1]
        # The final state does not depend on q: no gradient and one of zeros mean the same.
        grads.append(
            torch.autograd.grad(
                loss_of(result, torch.zeros(1, device="cuda")),
                xs,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    for name, a, b in zip(NAMES, *grads, strict=True):
        assert_same(a, b, BF16_KERNEL, f"gradient of {name}")


def test_no_state_is_a_state_of_zeros():
    *inputs, state = make_inputs(2, 65, 2)
    o, final = gated_delta_rule(*inputs, impl="fla")
    want_o, want_final = gated_delta_rule(*inputs, state=torch.zeros_like(state), impl="fla")
    assert torch.equal(o, want_o) and torch.equal(final, want_final)
    grads = torch.autograd.grad(loss_of(o, final), inputs)
    want = torch.autograd.grad(loss_of(want_o, want_final), inputs)
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


def test_views_of_a_fused_projection():
    """q, k, v cut out of one tensor are strided; so may the gradient of o be."""
    *inputs, state = make_inputs(2, 65, 2)
    fused = torch.cat(inputs[:3], dim=-1).detach().requires_grad_()
    o, _ = gated_delta_rule(*fused.split(64, dim=-1), *inputs[3:], state=state, impl="fla")
    want_o, _ = gated_delta_rule(*inputs, state=state, impl="fla")
    weight = torch.randn(2, H, 65, 64, device="cuda").transpose(1, 2).bfloat16()
    (got,) = torch.autograd.grad((o * weight).sum(), fused)
    want = torch.autograd.grad((want_o * weight).sum(), inputs[:3])
    assert torch.equal(o, want_o) and torch.equal(got, torch.cat(want, dim=-1))


def test_bounds_written_anew_in_the_same_buffer():
    """fla keeps chunk tables by the identity of cu_seqlens; a reused buffer needs new ones."""
    buffer = packed((100, 28))
    inputs = make_inputs(1, 128, 2)
    run(inputs, "fla", cu_seqlens=buffer)
    buffer.copy_(packed((30, 98)))
    assert_kernel_is_right(inputs, cu_seqlens=buffer)
    with torch.inference_mode():
        buffer = packed((100, 28))
        run(inputs, "fla", cu_seqlens=buffer)
        buffer.copy_(packed((30, 98)))
        o, _ = run(inputs, "fla", cu_seqlens=buffer)
        want, _ = run(inputs, "naive", cu_seqlens=buffer)
    assert_same(o, want, BF16_KERNEL, "o under inference mode")


@pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
def test_block_compiles_whole(documents):
    """Forward and backward in one graph each, with eager's results."""
    cu_seqlens = None if documents is None else packed(documents)
    inputs = make_inputs(1, 200, 1 if documents is None else len(documents))

    def block(q, k, v, g, beta, state):
        o, final = run((q * 2, k, v, g, beta, state), "auto", cu_seqlens=cu_seqlens)
        return F.silu(o), final

    want = block(*inputs)
    got = torch.compile(block, fullgraph=True)(*inputs)
    want_grads = torch.autograd.grad(loss_of(*want), inputs)
    got_grads = torch.autograd.grad(loss_of(*got), inputs)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert_same(a, b, BF16_KERNEL)  # a fused silu keeps digits that eager rounds away


@pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
@pytest.mark.parametrize("with_state", [False, True])
def test_operator_is_registered_well(documents, with_state):
    """Schema, fake shapes, autograd and dynamic shapes, by torch's own check."""
    from apps.LT2.kernel.gated_delta_rule.fla import _backward, _forward

    cu_seqlens = None if documents is None else packed(documents)
    *inputs, state = make_inputs(1, 200, 1 if documents is None else len(documents))
    state = state if with_state else None
    scale = inputs[0].shape[-1] ** -0.5
    torch.library.opcheck(_forward, (*inputs, state, cu_seqlens, scale))

    with torch.no_grad():
        o, final, g_sum, solved = _forward(*inputs, state, cu_seqlens, scale)
        q, k, v, _, beta = inputs
        saved = (q, k, v, g_sum, beta, solved, state, cu_seqlens)
        saved = (*(x if x is None else x.detach() for x in saved), scale)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_backward, (*saved, o, final), test_utils=checks)
    torch.library.opcheck(_backward, (*saved, o, None), test_utils=checks)


def test_unsupported_inputs_name_what_works():
    cases = [
        (make_inputs(1, 4, 1, 512, 64), "key width.*512"),
        (make_inputs(1, 4, 1, 63, 64), "even.*63"),
        ([x.detach().float() for x in make_inputs(1, 4, 1)], "impl='chunked'"),
    ]
    for inputs, message in cases:
        with pytest.raises(UserError, match=message):
            run(inputs, "fla")


def test_auto_computes_fp32_inputs_in_fp32():
    exact = [x.detach().float() for x in make_inputs(2, 100, 2)]
    for got, want in zip(run(exact, "auto"), run(exact, "naive"), strict=True):
        assert_same(got, want, FP32)


def test_step_in_a_cuda_graph_equals_naive():
    *inputs, state = [x.detach() for x in make_inputs(3, 12, 3, 96, 192)]
    exact = [x.float() for x in inputs]
    want, want_final = gated_delta_rule(*exact, state=state, impl="naive")

    token = [x[:, 0].clone() for x in inputs]
    working = state.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gated_delta_step(*token, working)  # warm-up, on a state that is reset below
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = gated_delta_step(*token, working)

    working.copy_(state)
    got = []
    for t in range(12):
        for slot, x in zip(token, inputs, strict=True):
            slot.copy_(x[:, t])
        graph.replay()
        got.append(output.clone())
    assert_same(torch.stack(got, dim=1), want, BF16_KERNEL, "o")  # computed in fp32, stored in bf16
    assert_same(working, want_final, FP32, "state")
