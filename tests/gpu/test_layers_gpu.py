"""Whole mixers on CUDA in bf16, and fla's layers with the same weights, against ours in fp32.

fla's layer right means that it is the same function, and ours right that projections, convolution,
gates and norm around the kernel are. A new mixer adds a row to ORACLES. All use head widths that
other tests have tuned already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.LT2.kernel.fla import import_fla
from apps.LT2.mixers import MIXERS
from apps.LT2.mixers.deltanet import DeltaNetArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.gla import GLAArgs
from apps.LT2.mixers.kda import KDAArgs
from apps.LT2.mixers.linear import LinearMixer
from apps.LT2.mixers.retnet import RetNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.optim import is_matrix
from tests.gpu.kernel_cases import packed
from tests.tolerances import BF16_LAYER, assert_same

pytestmark = pytest.mark.gpu

DIM, HEADS, WIDTH, EPS = 128, 2, 64, 1e-5
QKVO = {
    "wq.weight": "q_proj.weight",
    "wk.weight": "k_proj.weight",
    "wv.weight": "v_proj.weight",
    "wo.weight": "o_proj.weight",
    "norm.weight": "o_norm.weight",
}
DECAY = {"A_log": "A_log", "dt_bias": "dt_bias"}


def qkv_conv(weights: dict[str, Tensor], mixer: LinearMixer) -> dict[str, Tensor]:
    """Our one convolution over q, k and v is three in fla, with nn.Conv1d's weights."""
    keys, values = mixer.n_heads * mixer.key_dim, mixer.n_heads * mixer.value_dim
    parts = weights["conv.weight"][:, None].split([keys, keys, values])
    return {f"{x}_conv1d.weight": part for x, part in zip("qkv", parts, strict=True)}


def half_split_rotary(weights: dict[str, Tensor], mixer: LinearMixer) -> dict[str, Tensor]:
    """We turn pairs (2i, 2i+1) of a head, fla (i, i + K/2): the same with rows in another order."""

    def reordered(weight: Tensor) -> Tensor:
        pairs = weight.unflatten(0, (mixer.n_heads, mixer.key_dim // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    return {f"{x}_proj.weight": reordered(weights[f"w{x}.weight"]) for x in "qk"}


def nothing_more(weights: dict[str, Tensor], mixer: LinearMixer) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Oracle:
    layer: str  # class in fla.layers
    names: dict[str, str]  # our parameter -> theirs
    options: dict[str, Any]  # of fla's layer, beside hidden_size, num_heads and norm_eps
    # What of their weights does not follow from `names`.
    others: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = qkv_conv
    args: dict[str, Any] = field(default_factory=dict)  # of our model
    takes_documents: bool = True


ORACLES = {
    "gdn": Oracle(
        "GatedDeltaNet",
        QKVO | DECAY | {f"w{x}.weight": f"{x}_proj.weight" for x in "gab"},
        {"head_dim": WIDTH, "expand_v": 1.0},
        args={"gdn": GatedDeltaNetArgs(head_dim=WIDTH, expand_v=1.0)},
    ),
    "kda": Oracle(
        "KimiDeltaAttention",
        QKVO
        | DECAY
        | {
            "wb.weight": "b_proj.weight",
            "wa_down.weight": "f_proj.0.weight",
            "wa_up.weight": "f_proj.1.weight",
            "wg_down.weight": "g_proj.0.weight",
            "wg_up.weight": "g_proj.1.weight",
            "gate_bias": "g_proj.1.bias",
        },
        {"head_dim": WIDTH, "allow_neg_eigval": True},
        args={"kda": KDAArgs(head_dim=WIDTH, allow_neg_eigval=True)},
    ),
    "deltanet": Oracle(
        "DeltaNet",
        QKVO | {"wb.weight": "b_proj.weight"},
        {},
        args={"deltanet": DeltaNetArgs(head_dim=WIDTH)},
    ),
    "retnet": Oracle(
        "MultiScaleRetention",
        {
            "wv.weight": "v_proj.weight",
            "wg.weight": "g_proj.weight",
            "wo.weight": "o_proj.weight",
            "norm.weight": "g_norm_swish_gate.weight",
        },
        {"expand_v": 1.0},
        others=half_split_rotary,
        args={"retnet": RetNetArgs(expand_v=1.0)},
    ),
    "gla": Oracle(
        "GatedLinearAttention",
        {
            "wq.weight": "q_proj.weight",
            "wk.weight": "k_proj.weight",
            "wv.weight": "v_proj.weight",
            "wg.weight": "g_proj.weight",
            "wo.weight": "o_proj.weight",
            "wa_down.weight": "gk_proj.0.weight",
            "wa_up.weight": "gk_proj.1.weight",
            "decay_bias": "gk_proj.1.bias",
            "norm.weight": "g_norm_swish_gate.weight",
        },
        {"expand_k": 1.0},
        others=nothing_more,
        args={"gla": GLAArgs(head_dim=WIDTH, expand_v=1.0)},
    ),
    "hgrn2": Oracle(
        "HGRN2Attention",
        {
            "wq.weight": "q_proj.weight",
            "wf.weight": "f_proj.weight",
            "wv.weight": "i_proj.weight",
            "wo.weight": "o_proj.weight",
            "norm.weight": "g_norm.weight",
        },
        {"expand_ratio": WIDTH},
        others=nothing_more,
    ),
}


def make(name: str) -> LinearMixer:
    """In fp32, off its initial values; bf16 holds the weights wherever fla's layer is bf16."""
    torch.manual_seed(0)
    oracle = ORACLES[name]
    args = LoopedTransformerArgs(
        dim=DIM, n_layers=1, n_heads=HEADS, norm_eps=EPS, vocab_size=8, **oracle.args
    )
    mixer = MIXERS[name](args)
    assert isinstance(mixer, LinearMixer)
    mixer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for parameter_name, p in mixer.named_parameters():
            p += 0.1 * torch.randn_like(p)
            if parameter_name not in DECAY:
                p.copy_(p.bfloat16())
    return mixer.cuda()


def in_bf16(mixer: LinearMixer) -> LinearMixer:
    """As training holds it: matrices in bf16, vectors in fp32."""
    mixer = copy.deepcopy(mixer)
    for name, p in mixer.named_parameters():
        if is_matrix(name, p):
            p.data = p.data.bfloat16()
    return mixer


def in_fla(name: str, mixer: LinearMixer) -> nn.Module:
    oracle = ORACLES[name]
    layer_class = getattr(import_fla("fla.layers"), oracle.layer)
    layer = layer_class(hidden_size=DIM, num_heads=HEADS, norm_eps=EPS, **oracle.options)
    ours = {name: p.detach() for name, p in mixer.named_parameters()}
    theirs = {oracle.names[name]: p for name, p in ours.items() if name in oracle.names}
    layer.load_state_dict(theirs | oracle.others(ours, mixer))
    layer.cuda()
    for parameter_name, p in layer.named_parameters():
        if parameter_name not in DECAY:
            p.data = p.data.bfloat16()
    return layer


def output_and_gradient(layer: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, **options)
    y = y[0] if isinstance(y, tuple) else y
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    (dx,) = torch.autograd.grad((y * probe).sum(), x)
    return {"output": y.float(), "gradient of the input": dx.float()}


@pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
@pytest.mark.parametrize("name", ORACLES)
def test_layer_equals_flas(name, documents):
    mixer = make(name)
    x = torch.randn(1 if documents else 2, 200, DIM, device="cuda").bfloat16()
    options = {} if documents is None else {"cu_seqlens": packed(documents)}
    want = output_and_gradient(mixer, x.float(), **options)
    got = {"ours": output_and_gradient(in_bf16(mixer), x, **options)}
    if documents is None or ORACLES[name].takes_documents:
        got["fla"] = output_and_gradient(in_fla(name, mixer), x, **options)
    for whose, results in got.items():
        for what, result in results.items():
            assert_same(result, want[what], BF16_LAYER, f"{whose}: {what}")
