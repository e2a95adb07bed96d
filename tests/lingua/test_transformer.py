"""The reference Transformer and the parts that applications share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lingua.errors import UserError
from lingua.transformer import (
    BaseTransformer,
    BaseTransformerArgs,
    FeedForward,
    RMSNorm,
    RotaryEmbedding,
    apply_rotary_emb,
    cross_entropy,
    depth_factor,
    repeat_kv,
    resolve_heads,
    rotary_angles,
    rotate_pairs,
    trunc_normal_,
)
from tests.lingua.dist_utils import run_ranks
from tests.tolerances import FP32, FP32_MODEL, assert_same

# ------------------------------------------------------------------------------------- rotary


def test_rotary_rotates_pairs_like_complex_numbers():
    x = torch.randn(2, 9, 3, 8)
    positions = torch.arange(100, 109)
    theta = 500.0
    angle = positions.double()[:, None] * theta ** (-torch.arange(0, 8, 2).double() / 8)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (4, 2)))
    want = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None])
    cos, sin = rotary_angles(positions, 8, theta)
    assert_same(rotate_pairs(x, cos[:, None], sin[:, None]), want.flatten(-2), FP32)


def test_both_rotary_forms_are_equal():
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8)
    table = RotaryEmbedding(500.0, 8, max_seqlen=16)
    cos, sin = rotary_angles(torch.arange(9), 8, 500.0)
    for got, x in zip(apply_rotary_emb(q, k, 1, table(seqlen=9)), (q, k), strict=True):
        assert_same(got, rotate_pairs(x, cos[:, None], sin[:, None]), FP32)


def test_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at: int, to: int) -> torch.Tensor:
        turned = [
            rotate_pairs(x, *rotary_angles(torch.tensor([p]), 16, 1e4))
            for x, p in ((q, at), (k, to))
        ]
        return (turned[0] * turned[1]).sum()

    assert_same(score(130, 100), score(30, 0), FP32_MODEL)
    assert abs(score(130, 100) - score(130, 99)) > 1e-3


def test_angles_are_fp32_for_half_precision():
    """Position 4001 is 4000 in bf16: the fastest pair would be a radian off."""
    x = torch.randn(1, 1, 1, 8)
    cos, sin = rotary_angles(torch.tensor([4001]), 8, 1e4)
    assert cos.dtype == sin.dtype == torch.float32
    got = rotate_pairs(x.bfloat16(), cos, sin)
    assert got.dtype == torch.bfloat16
    assert_same(got, rotate_pairs(x.bfloat16().float(), cos, sin), 4e-3)


def test_rotary_table_is_filled_after_meta_init_and_not_in_checkpoints():
    with torch.device("meta"):
        table = RotaryEmbedding(1e4, 8, max_seqlen=12)
    table.to_empty(device="cpu")
    table.freqs_cis.fill_(float("nan"))
    table.reset_parameters()
    assert torch.equal(table.freqs_cis, RotaryEmbedding(1e4, 8, max_seqlen=12).freqs_cis)
    assert not table.state_dict()
    assert torch.equal(table(tok_idx=torch.tensor([3, 1])), table(seqlen=12)[[3, 1]])


def test_repeat_kv_repeats_each_head():
    x = torch.arange(2).view(1, 1, 2, 1)
    assert repeat_kv(x, 3).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert repeat_kv(x, 1) is x


# ------------------------------------------------------------------------------------ modules


def test_rms_norm_is_fp32_inside():
    norm = RMSNorm(64, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = 300 * torch.randn(2, 64)  # squares overflow fp16
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert_same(norm(x), want, FP32)
    assert norm(x.half()).dtype == torch.float16
    assert_same(norm(x.half()), want, 2e-3)


@pytest.mark.parametrize(
    "dim, multiple_of, multiplier, hidden_dim",
    [(1024, 256, None, 2816), (2048, 256, None, 5632), (512, 256, 1.5, 2048), (48, 1, None, 128)],
)
def test_ffn_dim(dim, multiple_of, multiplier, hidden_dim):
    with torch.device("meta"):
        assert FeedForward(dim, 4 * dim, multiple_of, multiplier).hidden_dim == hidden_dim


def test_ffn_is_swiglu():
    ffn, x = FeedForward(8, 32, 4), torch.randn(3, 8)
    gate = x @ ffn.w1.weight.T
    want = (gate * torch.sigmoid(gate) * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T
    assert_same(ffn(x), want, FP32)


def test_cross_entropy_is_fp32_and_takes_any_shape():
    logits, target = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    target[0, 1] = -100
    got = cross_entropy(logits.bfloat16(), target)
    want = F.cross_entropy(logits.bfloat16().float().flatten(0, 1), target.flatten())
    assert got.dtype == torch.float32
    assert_same(got, want, FP32)


ARGS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16}


def make(**changes) -> BaseTransformer:
    torch.manual_seed(0)
    model = BaseTransformer(BaseTransformerArgs(**{**ARGS, "max_seqlen": 32, **changes}))
    model.init_weights()
    return model


def test_transformer_is_causal():
    model, h = make(), torch.randn(1, 9, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(model(h)[0, 5].square().sum(), h)
    assert not grad[0, 6:].any() and grad[0, :6].abs().sum(-1).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_all_mask_forms_are_equal():
    from torch.nn.attention.flex_attention import create_block_mask

    model, h = make().requires_grad_(False), torch.randn(2, 9, 32)
    want = model(h)
    tensor = torch.ones(9, 9, dtype=torch.bool).tril()
    block = create_block_mask(lambda b, h, q, k: q >= k, None, None, 9, 9, device="cpu")
    assert_same(model(h, mask=tensor), want, FP32)
    assert_same(model(h, mask=block, attn_impl="flex_attention"), want, FP32)
    assert not torch.allclose(model(h, mask=None), want)  # every token sees every token


def test_an_unknown_attention_backend_is_a_user_error():
    with pytest.raises(UserError, match="attn_impl='flash'"):
        make()(torch.randn(1, 3, 32), attn_impl="flash")


@pytest.mark.parametrize(
    "n_heads, head_dim, n_kv_heads, resolved",
    [
        (4, None, None, (4, 4, 8)),
        (None, 16, None, (2, 2, 16)),
        (4, 24, 2, (4, 2, 24)),  # head_dim may exceed dim / n_heads
    ],
)
def test_heads_are_resolved(n_heads, head_dim, n_kv_heads, resolved):
    args = BaseTransformerArgs(dim=32, n_heads=n_heads, head_dim=head_dim, n_kv_heads=n_kv_heads)
    assert resolve_heads(args) == resolved


@pytest.mark.parametrize(
    "dim, n_heads, head_dim",
    [
        (2048, 16, 128),
        (1024, 8, 128),
        (128, 1, 128),
        (64, 1, 64),
        (320, 2, 160),
        (1000, 5, 200),  # 7 heads would not divide dim
        (254, 1, 254),
    ],
)
def test_default_heads_have_128_channels(dim, n_heads, head_dim):
    args = BaseTransformerArgs(dim=dim)
    assert resolve_heads(args) == (n_heads, n_heads, head_dim)


# --------------------------------------------------------------------------------------- init


def test_init_fills_every_tensor_of_a_model_built_on_meta():
    with torch.device("meta"):
        model = BaseTransformer(BaseTransformerArgs(**ARGS))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize(
    "kind, factor",
    [
        ("disabled", 1.0),
        ("global_depth", (2 * 6 * 4) ** 0.5),
        ("current_depth", (2 * (3 * 6 + 3)) ** 0.5),
        ("dim_ratio", 0.25),
    ],
)
def test_depth_factor_counts_effective_depth(kind, factor):
    assert depth_factor(kind, dim=1024, layer=2, n_layers=6, loop_count=4) == factor


def test_trunc_normal_is_cut_at_three_standard_deviations():
    x = trunc_normal_(torch.empty(200, 200), 0.5)
    assert 1.4 < x.abs().max() <= 1.5
    assert x.std().item() == pytest.approx(0.5 * 0.9866, rel=0.02)
    assert x.mean().item() == pytest.approx(0, abs=0.01)


PLACEMENTS = [[Shard(0)], [Shard(1)], [Replicate()]]
SHAPE = (7, 5)  # shards of unequal size, one of them


def draw_on_rank(rank: int, world_size: int) -> list[torch.Tensor]:
    """Draw twice per placement: the second draw shows that the generators stay in sync."""
    mesh = init_device_mesh("cpu", (world_size,))
    drawn = []
    for placements in PLACEMENTS:
        torch.manual_seed(3)
        for _ in range(2):
            tensor = distribute_tensor(torch.zeros(SHAPE), mesh, placements)
            assert trunc_normal_(tensor, 0.5) is tensor
            assert isinstance(tensor, DTensor)
            drawn.append(tensor.full_tensor())
    return drawn


def test_sharded_tensors_equal_the_draw_of_one_process():
    torch.manual_seed(3)
    want = [trunc_normal_(torch.empty(SHAPE), 0.5) for _ in range(2)]
    for drawn in run_ranks(2, draw_on_rank):
        for got, expected in zip(drawn, want * len(PLACEMENTS), strict=True):
            assert torch.equal(got, expected)
