"""Reference Transformer: the Llama block in plain PyTorch, and the parts that applications share.

    x = x + attention(norm(x));  x = x + feed_forward(norm(x))

Parameter names and rotary layout (interleaved pairs) are Llama's, so Meta's checkpoints load
unchanged. Shapes: B batch, S tokens, D model dim, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lingua.errors import UserError
from lingua.parallel.tensor_parallel import copy_whole


class InitStdFactor(Enum):
    """What divides the std of output projections."""

    DISABLED = "disabled"  # 1
    GLOBAL_DEPTH = "global_depth"  # sqrt(2 * depth of the whole model)
    CURRENT_DEPTH = "current_depth"  # sqrt(2 * depth of this layer)
    DIM_RATIO = "dim_ratio"  # dim / 4096


@dataclass
class BaseTransformerArgs:
    dim: int = 512  # model dim
    n_layers: int = 8  # physical layers
    head_dim: int | None = None  # dim of an attention head; null = dim / n_heads
    n_heads: int | None = None  # query heads; null = dim / head_dim, or dim / 128
    n_kv_heads: int | None = None  # key and value heads (GQA); null = n_heads
    ffn_dim_multiplier: float | None = None  # scales the FFN dim 8/3 * dim; null = 1
    multiple_of: int = 256  # the FFN dim is rounded up to a multiple of this
    norm_eps: float = 1e-5  # epsilon of every RMSNorm
    rope_theta: float = 10000.0  # base of the rotary frequencies
    init_base_std: float | None = None  # std of every weight; null = fan_in ** -0.5
    init_std_factor: str = "disabled"  # disabled | global_depth | current_depth | dim_ratio
    max_seqlen: int = 1024  # longest sequence; the trainer sets it to data.seq_len

    def __post_init__(self) -> None:
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0")
        if self.init_base_std is not None and not self.init_base_std > 0:
            raise UserError(
                f"model.init_base_std={self.init_base_std} must be above 0, or null for "
                "fan_in ** -0.5"
            )
        factors = [factor.value for factor in InitStdFactor]
        if self.init_std_factor not in factors:
            raise UserError(
                f"model.init_std_factor={self.init_std_factor!r} must be one of "
                f"{', '.join(factors)}"
            )


def check_sizes(section: str, args: object, *fields: str) -> None:
    """Raise UserError for a size below 1; null is a default if the field's type allows it."""
    for field in fields:
        value = getattr(args, field)
        if value is not None and value < 1:
            or_null = ", or null" if getattr(type(args), field, 1) is None else ""
            raise UserError(f"{section}.{field}={value} must be at least 1{or_null}")


def query_heads(args: BaseTransformerArgs) -> int:
    """Return model.n_heads; by default dim / head_dim, or the most heads of at least 128."""
    check_sizes("model", args, "n_heads", "head_dim")
    dim, head_dim = args.dim, args.head_dim
    if args.n_heads is not None:
        return args.n_heads
    if head_dim is None:
        return next(n for n in range(max(dim // 128, 1), 0, -1) if dim % n == 0)
    if dim % head_dim:
        raise UserError(
            f"model.head_dim={head_dim} must divide model.dim={dim}; "
            "use a divisor or set model.n_heads"
        )
    return dim // head_dim


def resolve_heads(args: BaseTransformerArgs) -> tuple[int, int, int]:
    """Return (query heads, key/value heads, head dim), defaults filled in; or raise UserError."""
    n_heads = query_heads(args)
    check_sizes("model", args, "n_kv_heads")
    if args.head_dim is None and args.dim % n_heads:
        raise UserError(
            f"model.n_heads={n_heads} must divide model.dim={args.dim}; "
            "use a divisor or set model.head_dim"
        )
    n_kv_heads = args.n_kv_heads or n_heads
    if n_heads % n_kv_heads:
        raise UserError(
            f"model.n_kv_heads={n_kv_heads} must divide the number of query heads, {n_heads}"
        )
    return n_heads, n_kv_heads, args.head_dim or args.dim // n_heads


def check_rotary_dim(head_dim: int, *, option: str = "model.head_dim") -> None:
    """Raise UserError for an odd head dim: rotary embedding rotates pairs."""
    if head_dim % 2:
        raise UserError(
            f"{option}={head_dim} (dim / n_heads if null) must be even for rotary embedding; use "
            f"{head_dim + 1}"
        )


# ---------------------------------------------------------------------------------------------
# Initialization


@torch.no_grad()
def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill `tensor` in place from N(0, std^2) cut at 3 std.

    A sharded tensor (DTensor) gets its part of the same draw that one process would make, so a
    seed gives the same model on any number of ranks.
    """
    whole = tensor
    if isinstance(tensor, DTensor):
        device = tensor.to_local().device
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    nn.init.trunc_normal_(whole, std=std, a=-3 * std, b=3 * std)
    if whole is not tensor:
        copy_whole(tensor, whole)
    return tensor


def init_linear(linear: nn.Linear, base_std: float | None, factor: float = 1.0) -> None:
    """Initialize a projection with std base_std, or fan_in ** -0.5 if None, divided by `factor`."""
    fan_in = linear.weight.shape[1]  # of the whole matrix, even if tensor parallelism splits it
    std = base_std if base_std is not None else fan_in**-0.5
    trunc_normal_(linear.weight, std / factor)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def depth_factor(kind: str, *, dim: int, layer: int, n_layers: int, loop_count: int = 1) -> float:
    """Return the divisor of the std of a layer's output projections; `layer` counts from 0.

    A layer that loops share counts with the depth of its last loop.
    """
    return {
        InitStdFactor.DISABLED: 1.0,
        InitStdFactor.GLOBAL_DEPTH: math.sqrt(2 * n_layers * loop_count),
        InitStdFactor.CURRENT_DEPTH: math.sqrt(2 * ((loop_count - 1) * n_layers + layer + 1)),
        InitStdFactor.DIM_RATIO: dim / 4096,
    }[InitStdFactor(kind)]


# ---------------------------------------------------------------------------------------------
# Loss and rotary embedding


def cross_entropy(pred: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    """Compute the cross-entropy of logits (..., V) and token ids (...) in fp32."""
    logits = pred.flatten(end_dim=-2).float()
    return F.cross_entropy(logits, target.flatten(), **kwargs)


def repeat_kv(x: Tensor, n_rep: int, dim: int = 2) -> Tensor:
    """Repeat each head along `dim` n_rep times, for the queries of its group."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=dim)


def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Return the angle per position of each pair, (K / 2,) in fp32."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    return theta ** (-pairs / head_dim)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin (..., K / 2) in fp32 for integer positions (...)."""
    frequencies = rotary_frequencies(head_dim, theta, positions.device)
    return cos_sin(positions.float().unsqueeze(-1) * frequencies)


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of angles (..., T, K / 2)."""
    if torch.compiler.is_compiling() and angles.shape[-2] > 1:
        return cos_sin_table(angles)
    return angles.cos(), angles.sin()


@torch.library.custom_op("lingua::cos_sin_table", mutates_args=())
def cos_sin_table(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cos and sin once per angle.

    Inductor would compute them again in every kernel that reads them, for every head. That takes
    longer than the rotation.
    """
    return angles.cos(), angles.sin()


@cos_sin_table.register_fake
def _(angles: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(angles), torch.empty_like(angles)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i+1]) of the last axis; fp32 inside, x's dtype outside.

    cos and sin broadcast to x's shape with the last axis halved.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """Return the rotation matrices (end, dim / 2, 2, 2) of positions 0 .. end-1, in fp32."""
    cos, sin = rotary_angles(torch.arange(end), dim, theta)
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor, seq_dim: int) -> Tensor:
    """View (S, K/2, 2, 2) so that it broadcasts to x (B, S, H, K) split in pairs."""
    outer = [1] * (x.ndim - 1)
    outer[seq_dim] = freqs_cis.shape[0]
    return freqs_cis.view(*outer, *freqs_cis.shape[1:])


def apply_rotary_emb(
    xq: Tensor, xk: Tensor, seq_dim: int, freqs_cis: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, S, H, K) by the matrices of their positions."""

    def rotate(x: Tensor) -> Tensor:
        pairs = x.float().unflatten(-1, (-1, 1, 2))  # B S H K/2 1 2
        rotated = pairs * reshape_for_broadcast(freqs_cis, x, seq_dim)
        return rotated.sum(-1).flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)


class RotaryEmbedding(nn.Module):
    """Table of rotation matrices, (max_seqlen, head_dim / 2, 2, 2) in fp32; not in checkpoints."""

    freqs_cis: Tensor

    def __init__(self, theta: float, head_dim: int, max_seqlen: int = 1024):
        super().__init__()
        check_rotary_dim(head_dim)
        self.theta, self.head_dim, self.max_seqlen = theta, head_dim, max_seqlen
        table = precompute_freqs_cis(head_dim, max_seqlen, theta)
        self.register_buffer("freqs_cis", table, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.freqs_cis.copy_(precompute_freqs_cis(self.head_dim, self.max_seqlen, self.theta))

    def forward(self, seqlen: int | None = None, tok_idx: Tensor | None = None) -> Tensor:
        """Return the matrices of positions `tok_idx`, or of the first `seqlen` positions."""
        assert seqlen is not None or tok_idx is not None, "seqlen or tok_idx must be given"
        return self.freqs_cis[tok_idx] if tok_idx is not None else self.freqs_cis[:seqlen]


# ---------------------------------------------------------------------------------------------
# Modules


class Linear(nn.Linear):
    """nn.Linear with a bias that may be fp32 beside bf16 weights, as all 1-D parameters are."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.type_as(input)
        return F.linear(input, self.weight, bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; fp32 inside, x's dtype outside."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x).type_as(x)

    def normalize(self, x: Tensor) -> Tensor:
        """Return the result in fp32."""
        wide = x.float()
        if x.is_cuda and not torch.compiler.is_compiling():  # one kernel; Inductor fuses its own
            return F.rms_norm(wide, self.weight.shape, self.weight.float(), self.eps)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide * scale * self.weight.float()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        multiple_of: int,
        ffn_dim_multiplier: float | None = None,
        mp_size: int = 1,
    ):
        """`hidden_dim` is a plain Transformer's, 4 dim; a third pays for the third matrix."""
        super().__init__()
        if multiple_of < 1:
            raise UserError(f"model.multiple_of={multiple_of} must be at least 1")
        scale = 1.0 if ffn_dim_multiplier is None else ffn_dim_multiplier
        hidden = multiple_of * math.ceil(int(scale * int(2 * hidden_dim / 3)) / multiple_of)
        if hidden < 1:
            raise UserError(
                f"model.ffn_dim_multiplier={ffn_dim_multiplier} must leave at least one of "
                f"8/3 * model.dim = {2 * hidden_dim // 3} channels; use 1, or null"
            )
        assert hidden % mp_size == 0, f"FFN dim {hidden} is not a multiple of mp_size {mp_size}"
        self.dim, self.hidden_dim = dim, hidden
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fused_linear(x, self.fused_linears())
        return self.w2(F.silu(gate) * up)

    def fused_linears(self) -> tuple[nn.Linear, ...]:
        """Return the linears of x, whose weights inference fuses."""
        return (self.w1, self.w3)

    def reset_parameters(self, init_std: float | None = None, factor: float = 1.0) -> None:
        init_linear(self.w1, init_std)
        init_linear(self.w3, init_std)
        init_linear(self.w2, init_std, factor)


class TiedLinear(nn.Module):
    """A head that uses the weight of `tied_module`, an embedding. It has no parameter itself."""

    def __init__(self, tied_module: nn.Module):
        super().__init__()
        self._tied = (tied_module,)  # in a tuple, so that its parameters are not registered twice

    @property
    def weight(self) -> Tensor:
        weight = self._tied[0].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@cache
def flex_attention_on(device_type: str) -> Any:
    """Return FlexAttention, compiled on CUDA: eager, it is slow and takes much memory."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


class Attention(nn.Module):
    """Grouped-query softmax attention with rotary positions."""

    def __init__(self, dim: int, head_dim: int, n_heads: int, n_kv_heads: int, rope_theta: float):
        super().__init__()
        self.dim, self.head_dim, self.rope_theta = dim, head_dim, rope_theta
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        freq_cis: Tensor,
        tok_idx: Tensor | None = None,
        mask: Any = None,
        attn_impl: str = "sdpa",
    ) -> Tensor:
        """Map x (B, S, D) to (B, S, D); `freq_cis` holds the matrices of x's positions.

        mask: for sdpa "causal", a boolean tensor or None; for flex_attention a BlockMask; for fmha
        an xformers AttentionBias. `tok_idx` is accepted for callers that also keep a cache.
        """
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        k = self.wk(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        q, k = apply_rotary_emb(q, k, 1, freq_cis)
        return self.wo(softmax_attention(q, k, v, mask, attn_impl).flatten(2))

    def reset_parameters(self, init_std: float | None = None, factor: float = 1.0) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init_linear(linear, init_std)
        init_linear(self.wo, init_std, factor)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, attn_impl: str) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v for (B, S, H, K) tensors."""
    if attn_impl == "fmha":
        from xformers.ops import fmha  # pyright: ignore[reportMissingImports]

        groups = q.shape[2] // k.shape[2]
        return fmha.memory_efficient_attention(
            q, repeat_kv(k, groups), repeat_kv(v, groups), attn_bias=mask
        )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if attn_impl == "flex_attention":
        out = flex_attention_on(q.device.type)(
            q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
    elif attn_impl == "sdpa":
        assert mask is None or isinstance(mask, (str, Tensor)), f"sdpa takes no {type(mask)} mask"
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask if isinstance(mask, Tensor) else None,
            is_causal=isinstance(mask, str) and mask == "causal",
            enable_gqa=q.shape[1] != k.shape[1],
        )
    else:
        raise UserError(f"attn_impl={attn_impl!r} must be one of sdpa, flex_attention, fmha")
    return out.transpose(1, 2)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, args: BaseTransformerArgs):
        super().__init__()
        n_heads, n_kv_heads, head_dim = resolve_heads(args)
        self.attention = Attention(args.dim, head_dim, n_heads, n_kv_heads, args.rope_theta)
        self.feed_forward = FeedForward(
            args.dim, 4 * args.dim, args.multiple_of, args.ffn_dim_multiplier
        )
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self,
        x: Tensor,
        freq_cis: Tensor,
        tok_idx: Tensor | None = None,
        mask: Any = None,
        attn_impl: str = "sdpa",
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freq_cis, tok_idx, mask, attn_impl)
        return h + self.feed_forward(self.ffn_norm(h))

    def init_weights(self, init_std: float | None = None, factor: float = 1.0) -> None:
        self.attention.reset_parameters(init_std, factor)
        self.attention_norm.reset_parameters()
        self.feed_forward.reset_parameters(init_std, factor)
        self.ffn_norm.reset_parameters()


class BaseTransformer(nn.Module):
    """A stack of blocks on hidden states: no embedding, no head, no loop."""

    def __init__(self, args: BaseTransformerArgs):
        super().__init__()
        self.args = args
        self.rope_embeddings = RotaryEmbedding(
            args.rope_theta, resolve_heads(args)[2], args.max_seqlen
        )
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))

    def forward(
        self,
        h: Tensor,
        tok_idx: Tensor | None = None,
        mask: Any = "causal",
        attn_impl: str = "sdpa",
    ) -> Tensor:
        freq_cis = self.rope_embeddings(seqlen=h.shape[1], tok_idx=tok_idx)
        for layer in self.layers:
            h = layer(h, freq_cis, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl)
        return h

    def reset_parameters(self) -> None:
        self.rope_embeddings.reset_parameters()

    def init_weights(self) -> None:
        self.reset_parameters()
        args = self.args
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, TransformerBlock)
            factor = depth_factor(
                args.init_std_factor, dim=args.dim, layer=i, n_layers=args.n_layers
            )
            layer.init_weights(args.init_base_std, factor)


@torch.no_grad()
def fuse_weights(linears: Sequence[nn.Linear]) -> None:
    """Move the weights of linears into one matrix, and their biases, in place, for `fused_linear`.

    They stay parameters: views of the fused tensors, which see what is written to them.
    """
    fused = torch.cat([linear.weight for linear in linears])
    for linear, weight in zip(linears, fused.split(_out_features(linears)), strict=True):
        linear.weight.data = weight
    linears[0].register_buffer("fused_weight", fused, persistent=False)
    if all(linear.bias is None for linear in linears):
        return
    biases = [
        fused.new_zeros(linear.out_features, dtype=torch.float32)
        if linear.bias is None
        else linear.bias
        for linear in linears
    ]
    whole = torch.cat(biases)
    for linear, bias in zip(linears, whole.split(_out_features(linears)), strict=True):
        if linear.bias is not None:
            linear.bias.data = bias
    linears[0].register_buffer("fused_bias", whole, persistent=False)


def fused_weight(linears: Sequence[nn.Linear]) -> Tensor | None:
    """Return the matrix (all outputs, inputs) that `fuse_weights` made, or None.

    `linears` may be the first ones of a longer fused list.
    """
    fused, n = getattr(linears[0], "fused_weight", None), sum(_out_features(linears))
    assert fused is None or fused.shape[0] >= n, "other linears are fused"
    return None if fused is None else fused[:n]


def fused_bias(linears: Sequence[nn.Linear], like: Tensor) -> Tensor | None:
    """Return the bias of all outputs in the dtype of `like`, or None if no linear has one."""
    bias = getattr(linears[0], "fused_bias", None)
    return None if bias is None else bias[: sum(_out_features(linears))].type_as(like)


def fused_linear(x: Tensor, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Return the output of each linear for x (..., inputs)."""
    weight = fused_weight(linears)
    if weight is None:
        return tuple(linear(x) for linear in linears)
    return F.linear(x, weight, fused_bias(linears, x)).split(_out_features(linears), dim=-1)


def _out_features(linears: Sequence[nn.Linear]) -> list[int]:
    return [linear.out_features for linear in linears]
