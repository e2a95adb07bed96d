"""Parts that the layers of several papers share, for one sequence, and the defaults of sizes.

A test file's `definition(weights, args, x_TD, window)` computes its paper's layer from these, with
torch alone: it may call nothing of apps or lingua.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Heads = list[tuple[Tensor, Tensor, Tensor]]


def linear(weights: Weights, name: str, x_TD: Tensor, n_heads: int = 1) -> tuple[Tensor, ...]:
    """Return x W^T + b of each head, if there is a bias; one head has all channels."""
    bias = weights.get(f"{name}.bias", torch.zeros(()))
    return (x_TD @ weights[f"{name}.weight"].T + bias).chunk(n_heads, dim=-1)


def head_shape(args: Any, own: Any, key_share: float = 1) -> tuple[int, int, int]:
    """Return heads, key dim and value dim of a linear mixer."""
    n_heads = own.n_heads or args.n_heads
    key_dim = own.head_dim or int(key_share * args.dim / n_heads)
    return n_heads, key_dim, int(key_dim * own.expand_v)


def convolve(weights: Weights, x_TC: Tensor, size: int, *, bias: bool = False) -> Tensor:
    """Convolve depthwise and causally, with the last weight on the current token; then SiLU."""
    if size == 0:
        return F.silu(x_TC)
    padded_CT = F.pad(x_TC.T, (size - 1, 0))
    y_CT = F.conv1d(padded_CT[None], weights["conv.weight"][:, None], groups=x_TC.shape[1])[0]
    return F.silu(y_CT.T + weights["conv.bias"] if bias else y_CT.T)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolved_heads(weights: Weights, x_TD: Tensor, own: Any, shape: tuple[int, int, int]) -> Heads:
    """Return (q (T, K), k (T, K), v (T, V)) of each head; q and k are unit vectors."""
    n_heads, keys, values = shape[0], shape[0] * shape[1], shape[0] * shape[2]
    streams_TC = torch.cat([x_TD @ weights[f"w{name}.weight"].T for name in "qkv"], dim=-1)
    q_TC, k_TC, v_TC = convolve(weights, streams_TC, own.conv_size).split([keys, keys, values], -1)
    heads = zip(*(x.chunk(n_heads, dim=-1) for x in (q_TC, k_TC, v_TC)), strict=True)
    return [(unit(q), unit(k), v) for q, k, v in heads]


def rms_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    assert eps is not None, "set mixer_norm_eps: torch takes None for another epsilon"
    return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], eps=eps)


def rotated(x_TK: Tensor, theta: float, scaling: Any = None) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) of token t, as complex numbers, by t theta^(-2i / K)."""
    T, K = x_TK.shape
    speed = theta ** (-torch.arange(0, K, 2, dtype=x_TK.dtype) / K)
    length = torch.ones((), dtype=x_TK.dtype)
    if scaling is not None:  # section 3 of https://arxiv.org/abs/2309.00071, with ends in whole i
        assert scaling.rope_type == "yarn"
        context = scaling.original_max_position_embeddings
        low, high = (
            K / 2 * math.log(context / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), K - 1)
        divided = ((torch.arange(K // 2) - low) / (high - low)).clamp(0, 1)
        speed = divided * speed / scaling.factor + (1 - divided) * speed
        length = length * (0.1 * math.log(scaling.factor) + 1)
    phase = torch.polar(length.expand(T, K // 2), torch.arange(T)[:, None] * speed)
    pairs = torch.view_as_complex(x_TK.reshape(T, K // 2, 2).contiguous())
    return torch.view_as_real(pairs * phase).flatten(1)


def softmax_heads(weights: Weights, args: Any, x_TD: Tensor, n_kv_heads: int) -> Heads:
    """Return rotated q and k, and v, of each query head; groups of heads share k and v."""
    q = linear(weights, "wq", x_TD, args.n_heads)
    k = linear(weights, "wk", x_TD, n_kv_heads)
    if args.qk_norm:
        q = [rms_norm(weights, "q_norm", head, args.norm_eps) for head in q]
        k = [rms_norm(weights, "k_norm", head, args.norm_eps) for head in k]
    q, k = ([rotated(x, args.rope_theta, args.rope_scaling) for x in heads] for heads in (q, k))
    v = linear(weights, "wv", x_TD, n_kv_heads)
    group = args.n_heads // n_kv_heads
    assert q[0].shape[1] == (args.head_dim or args.dim // args.n_heads)
    return [(q[h], k[h // group], v[h // group]) for h in range(args.n_heads)]
