"""The attention backends on a CPU against dense attention."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apps.LT2.kernel.attention import (
    IMPLS,
    attention,
    check_attention_device,
    check_attention_impl,
    decode_attention,
)
from apps.LT2.kernel.attention.naive import naive_attention, visible_keys
from lingua.errors import UserError
from tests.tolerances import FP32, assert_same

HEAD_DIM = 8


def qkv(batch: int, n_tokens: int, n_heads: int = 4, n_kv_heads: int = 2):
    generator = torch.Generator().manual_seed(n_tokens)
    return [
        torch.randn(batch, n_tokens, n, HEAD_DIM, generator=generator).requires_grad_()
        for n in (n_heads, n_kv_heads, n_kv_heads)
    ]


def boundaries(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_visible_keys():
    got = visible_keys(5, window=2, cu_seqlens=boundaries(3, 2), device="cpu")
    want = ["1....", "11...", ".11..", "...1.", "...11"]
    assert ["".join("1" if v else "." for v in row) for row in got] == want


def test_naive_attention_is_softmax_over_the_visible_keys():
    q, k, v = qkv(1, 7)
    got = naive_attention(q, k, v, window=3, cu_seqlens=boundaries(2, 5))
    for t in range(7):
        first = max(t - 2, 0 if t < 2 else 2)
        for head in range(4):
            keys, values = k[0, first : t + 1, head // 2], v[0, first : t + 1, head // 2]
            weights = (keys @ q[0, t, head] / HEAD_DIM**0.5).softmax(0)
            assert_same(got[0, t, head], weights @ values, FP32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("impl", ["auto", "sdpa", "flex_attention"])
@pytest.mark.parametrize("window", [None, 1, 2, 12, 13, 14])
@pytest.mark.parametrize("documents", [None, (5, 0, 1, 7), (13,)])
def test_backends_agree_with_the_definition(impl, window, documents):
    cu_seqlens = boundaries(*documents) if documents else None
    q, k, v = qkv(1 if documents else 2, 13)
    options = {"window": window, "cu_seqlens": cu_seqlens}
    trains = impl != "flex_attention"  # its backward needs CUDA
    inputs = (q, k, v) if trains else (q.detach(), k.detach(), v.detach())
    got = attention(*inputs, impl=impl, **options)
    want = naive_attention(q, k, v, **options)
    assert_same(got, want, FP32)
    if not trains:
        return
    probe = torch.randn_like(want)
    got = torch.autograd.grad((got * probe).sum(), (q, k, v))
    want = torch.autograd.grad((want * probe).sum(), (q, k, v))
    for name, g, w in zip("qkv", got, want, strict=True):
        if w.norm() > 1e-5:  # else every query sees one key, and q and k have no effect
            assert_same(g, w, FP32, name)


@pytest.mark.parametrize(
    "head_dim, backend", [(8, "flash"), (20, "sdpa"), (256, "flash"), (264, "sdpa")]
)
@pytest.mark.parametrize("case", ["window", "documents"])
def test_auto_on_a_gpu_uses_flash_for_supported_head_dims(monkeypatch, head_dim, backend, case):
    for name in ("flash", "sdpa"):
        function = "_varlen_flash" if name == "flash" else "_sdpa"
        monkeypatch.setattr(f"apps.LT2.kernel.attention.{function}", lambda *_, name=name: name)
    with FakeTensorMode():
        q, k, v = torch.empty(3, 1, 9, 2, head_dim, dtype=torch.bfloat16, device="cuda")
        if case == "window":
            assert attention(q, k, v, window=4) == backend
        else:
            assert attention(q, k, v, cu_seqlens=boundaries(5, 4)) == backend
        assert attention(q, k, v) == "sdpa"


def test_half_precision_keeps_its_dtype():
    q, k, v = (x.bfloat16() for x in qkv(1, 9))
    for impl in ("auto", "naive"):
        assert attention(q, k, v, window=4, impl=impl).dtype == torch.bfloat16


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_a_decoded_query_sees_the_valid_slots_of_its_row(n_kv_heads):
    q, k, v = qkv(3, 6, n_kv_heads=n_kv_heads)
    n_valid = torch.tensor([1, 4, 6])
    got = decode_attention(q[:, 0], k, v, n_valid)
    for row, n in enumerate(n_valid.tolist()):
        # The order of slots does not matter, as in a ring buffer.
        order = torch.randperm(n)
        ends = torch.cat((q[row, :1].expand(n, -1, -1)[:-1], q[row, :1]))[None]
        want = naive_attention(ends, k[row, order][None], v[row, order][None])[0, -1]
        assert_same(got[row], want, FP32)


def test_documents_must_be_in_one_row():
    with pytest.raises(AssertionError, match="one row"):
        attention(*qkv(2, 4), cu_seqlens=boundaries(2, 2))


@pytest.mark.parametrize(
    "impl, windowed, option",
    [("flash", False, "model.attn_impl='flash'"), ("sdpa", True, "model.attn_impl=sdpa")],
)
def test_unsupported_backends_raise_user_errors(impl, windowed, option):
    with pytest.raises(UserError, match=option) as error:
        check_attention_impl(impl, windowed=windowed)
    assert "flex_attention" in str(error.value)


def test_every_listed_backend_may_be_configured():
    for impl in IMPLS:
        check_attention_impl(impl, windowed=False)


@pytest.mark.parametrize("device, dtype", [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_fmha_raises_a_user_error_without_cuda_or_half_precision(device, dtype):
    with pytest.raises(UserError, match=r"model\.attn_impl=fmha"):
        check_attention_device("fmha", device_type=device, dtype=dtype)


def test_flex_attention_on_cpu_cannot_train():
    options = {"device_type": "cpu", "dtype": torch.float32}
    check_attention_device("flex_attention", **options)
    with pytest.raises(UserError, match=r"model\.attn_impl=flex_attention"):
        check_attention_device("flex_attention", **options, training=True)
