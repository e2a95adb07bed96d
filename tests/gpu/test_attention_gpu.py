"""Every attention backend on CUDA against dense fp32 attention: outputs and all gradients."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from apps.LT2.kernel.attention import attention, decode_attention
from apps.LT2.kernel.attention.naive import naive_attention
from tests.tolerances import BF16_KERNEL, assert_same

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
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        options["cu_seqlens"] = bounds.int().cuda()
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


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_decode_attention_equals_dense_attention(n_kv_heads):
    q, k, v = (t.detach() for t in make_qkv(n_kv_heads))
    n_valid = torch.tensor([101], device="cuda")
    got = decode_attention(q[:, 100], k, v, n_valid)
    want = naive_attention(*(t[:, :101].float() for t in (q, k, v)))[:, 100]
    assert_same(got, want, BF16_KERNEL)
