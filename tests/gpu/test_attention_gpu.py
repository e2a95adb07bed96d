"""The attention backends on CUDA against dense fp32 attention: outputs and all gradients."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from apps.LT2.kernel.attention import attention, decode_attention
from apps.LT2.kernel.attention.decode import decode_attention_triton
from apps.LT2.kernel.attention.naive import naive_attention
from tests.tolerances import BF16_KERNEL, FP32, assert_same

pytestmark = pytest.mark.gpu

has_xformers = importlib.util.find_spec("xformers") is not None
IMPLS = [
    "auto",
    "sdpa",
    "flex_attention",
    pytest.param("fmha", marks=pytest.mark.skipif(not has_xformers, reason="needs xformers")),
]
CASES = {
    "causal": {},
    "window": {"window": 33},
    "window-1": {"window": 1},
    "packed": {"lengths": [1, 64, 130, 62]},
    "packed-window": {"lengths": [1, 64, 130, 62], "window": 33},
}


def make_qkv(n_kv_heads: int, T: int = 257, K: int = 64):
    torch.manual_seed(0)
    shapes = [(1, T, 4, K), (1, T, n_kv_heads, K), (1, T, n_kv_heads, K)]
    return [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_backend_equals_dense_attention(impl, case, n_kv_heads):
    options = dict(CASES[case])
    if impl == "sdpa" and "window" in options:
        pytest.skip("refused when the model is built")
    if lengths := options.pop("lengths", None):
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    qkv = make_qkv(n_kv_heads)
    out = attention(*qkv, impl=impl, **options)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out.float() * weights.float()).sum(), qkv)

    wide = [t.detach().float().requires_grad_() for t in qkv]
    want_out = naive_attention(*wide, **options)
    want = torch.autograd.grad((want_out * weights.float()).sum(), wide)
    assert_same(out, want_out, BF16_KERNEL, "o")
    for name, g, w in zip("qkv", got, want, strict=True):
        assert_same(g, w, BF16_KERNEL, f"d{name}")


@pytest.mark.parametrize("head_dim", [20, 272])
@pytest.mark.parametrize("case", CASES)
def test_auto_supports_head_dims_without_flash_kernels(case, head_dim):
    options = dict(CASES[case])
    if lengths := options.pop("lengths", None):
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    qkv = make_qkv(2, K=head_dim)
    out = attention(*qkv, **options)
    out.float().sum().backward()
    wide = [t.detach().float() for t in qkv]
    assert_same(out, naive_attention(*wide, **options), BF16_KERNEL, "o")
    assert all(t.grad is not None and t.grad.isfinite().all() for t in qkv)


@pytest.mark.parametrize("impl", ["sdpa", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "B, H, G, K, S",
    [
        (3, 4, 4, 64, 700),
        (2, 16, 1, 32, 300),
        (2, 8, 2, 48, 65),
        (1, 4, 2, 256, 3000),
        (2, 1, 1, 8, 1),
    ],
)
def test_decode_attention_equals_dense_attention(impl, dtype, B, H, G, K, S):
    """Each row has its own number of valid slots; the other slots have no effect."""
    torch.manual_seed(0)
    q = torch.randn(B, H, K, dtype=dtype, device="cuda")
    k, v = torch.randn(2, B, S, G, K, dtype=dtype, device="cuda")
    n_valid = torch.tensor([[S, 1, max(S - 1, 1)][:B], [-1] * B], device="cuda").T[:, 0]  # strided
    got = decode_attention(q, k, v, n_valid, impl=impl)
    assert got.dtype == dtype
    bound = BF16_KERNEL if dtype == torch.bfloat16 else FP32
    for b, n in enumerate(n_valid.tolist()):
        queries = q[b].expand(1, n, H, K).float()  # the last one sees all n keys
        want = naive_attention(queries, k[b, None, :n].float(), v[b, None, :n].float())
        assert_same(got[b], want[0, -1], bound, "o")


def test_decode_attention_does_not_read_empty_slots():
    q = torch.randn(2, 4, 64, device="cuda")
    k, v = torch.full((2, 2, 300, 2, 64), torch.nan, device="cuda")
    n_valid = torch.tensor([7, 131], device="cuda")
    for b, n in enumerate(n_valid.tolist()):
        k[b, :n] = v[b, :n] = 1.0
    torch.testing.assert_close(decode_attention(q, k, v, n_valid), torch.ones_like(q))


def test_decode_attention_is_registered_well():
    q = torch.randn(2, 4, 64, device="cuda")
    k, v = torch.randn(2, 2, 100, 2, 64, device="cuda")
    n_valid = torch.tensor([100, 3], device="cuda")
    torch.library.opcheck(decode_attention_triton, (q, k, v, n_valid))
