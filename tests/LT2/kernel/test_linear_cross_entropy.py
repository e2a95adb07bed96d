"""The chunked loss equals the plain cross-entropy and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from apps.LT2.kernel import linear_cross_entropy as module
from apps.LT2.kernel.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy
from tests.tolerances import BF16_KERNEL, FP32, assert_same

N, D, V, CHUNK = 21, 16, 50, 8  # two whole chunks and a part


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", CHUNK)


def inputs(n: int = N, ignored: tuple[int, ...] = (), dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(V, (n,), generator=generator)
    target[list(ignored)] = -100
    return hidden, weight, target


@pytest.mark.parametrize("form", [linear_cross_entropy, naive_linear_cross_entropy])
@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, N])
@pytest.mark.parametrize("ignored", [(), (0,), (0, 2, 3, 4, 5, 6)])
def test_loss_and_gradients_are_those_of_cross_entropy(form, n, ignored):
    hidden, weight, target = inputs(n, tuple(i for i in ignored if i < n - 1))
    got = form(hidden, weight, target)
    want = F.cross_entropy(hidden @ weight.T, target)
    assert_same(got, want, FP32)
    # A factor on the loss, as in gradient accumulation.
    got = torch.autograd.grad(3 * got, (hidden, weight))
    want = torch.autograd.grad(3 * want, (hidden, weight))
    for name, g, w in zip(("hidden", "weight"), got, want, strict=True):
        assert_same(g, w, FP32, name)


def test_a_chunk_without_targets_has_no_weight():
    hidden, weight, target = inputs(ignored=tuple(range(CHUNK, 2 * CHUNK)))
    assert_same(
        linear_cross_entropy(hidden, weight, target),
        F.cross_entropy(hidden @ weight.T, target),
        FP32,
    )


@pytest.mark.parametrize("n_targets", [3.0, 15.0, 0.25])
def test_the_sum_is_divided_by_a_given_number_of_targets(n_targets):
    """The number that the targets have gives the same bits as none."""
    hidden, weight, target = inputs(ignored=tuple(range(6)))
    given = linear_cross_entropy(hidden, weight, target, n_targets=torch.tensor(n_targets))
    mean = linear_cross_entropy(hidden, weight, target)
    got, want = (torch.autograd.grad(loss, (hidden, weight)) for loss in (given, mean))
    for g, w in zip((given, *got), (mean, *want), strict=True):
        assert_same(g, w * 15 / n_targets, FP32)
        assert torch.equal(g, w) == (n_targets == 15)


@pytest.mark.parametrize("form", [linear_cross_entropy, naive_linear_cross_entropy])
def test_no_target_at_all_gives_zero_and_zero_gradients(form):
    hidden, weight, target = inputs(ignored=tuple(range(N)))
    loss = form(hidden, weight, target)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_large_logits_do_not_overflow():
    hidden, weight, target = inputs()
    got = linear_cross_entropy(hidden * 1e4, weight, target)
    assert_same(got, F.cross_entropy(1e4 * hidden @ weight.T, target), FP32)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got, (hidden, weight)))


def test_half_precision_inputs_give_an_fp32_loss():
    hidden, weight, target = inputs(dtype=torch.bfloat16)
    got = linear_cross_entropy(hidden, weight, target)
    want = F.cross_entropy(hidden.float() @ weight.float().T, target)
    assert got.dtype == torch.float32
    assert_same(got, want, FP32)
    got_grads = torch.autograd.grad(got, (hidden, weight))
    want_grads = torch.autograd.grad(want, (hidden, weight))
    for g, w in zip(got_grads, want_grads, strict=True):
        assert g.dtype == torch.bfloat16
        assert_same(g, w, BF16_KERNEL)


def test_frozen_weight_gets_no_gradient():
    hidden, weight, target = inputs()
    linear_cross_entropy(hidden, weight.detach(), target).backward()
    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, target), hidden)
    assert_same(hidden.grad, want[0], FP32)


class Recorder(TorchDispatchMode):
    """Count matrix products, and the elements of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.n_products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_only_a_chunk_of_logits_exists_at_a_time():
    hidden, weight, target = inputs(20 * CHUNK)
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight, target).backward()
    assert recorder.largest <= max(CHUNK * V, hidden.numel(), weight.numel())


def test_no_grad_computes_no_gradients():
    hidden, weight, target = inputs()
    with torch.no_grad(), Recorder() as recorder:
        linear_cross_entropy(hidden, weight, target)
    assert recorder.n_products == -(-N // CHUNK)
