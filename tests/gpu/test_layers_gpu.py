"""Mixers on CUDA in bf16, and fla's layers with the same weights, against the papers' definitions.

The definitions are those of tests/LT2/mixers, in fp64. fla's layer right means that it is the same
function, and ours right that projections, convolution, gates and norm around the kernel are. A new
mixer adds a row to ORACLES. All use head dims that other tests have tuned already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.LT2.kernel.attention import naive_attention
from apps.LT2.kernel.fla import import_fla
from apps.LT2.mixers import MIXERS, Mixer, build_mixer
from apps.LT2.mixers.deltanet import DeltaNetArgs
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.gla import GLAArgs
from apps.LT2.mixers.kda import KDAArgs
from apps.LT2.mixers.linear import LinearMixer
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.mixers.retnet import RetNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.optim import is_matrix
from tests.gpu.kernel_cases import packed
from tests.LT2.mixer_cases import definition_of
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
HEADS_AND_NORM = {"num_heads": HEADS, "norm_eps": EPS}
DECAY = {"A_log": "A_log", "dt_bias": "dt_bias"}


def qkv_conv(weights: dict[str, Tensor], mixer: LinearMixer) -> dict[str, Tensor]:
    """Split our convolution over q, k and v into fla's three, with nn.Conv1d's weights."""
    keys, values = mixer.n_heads * mixer.key_dim, mixer.n_heads * mixer.value_dim
    parts = weights["conv.weight"][:, None].split([keys, keys, values])
    return {f"{x}_conv1d.weight": part for x, part in zip("qkv", parts, strict=True)}


def half_split_rotary(weights: dict[str, Tensor], mixer: Mixer) -> dict[str, Tensor]:
    """Reorder rows: we rotate pairs (2i, 2i+1) of a head, fla (i, i + K/2)."""

    def reordered(weight: Tensor) -> Tensor:
        pairs = weight.unflatten(0, (-1, WIDTH // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    return {f"{x}_proj.weight": reordered(weights[f"w{x}.weight"]) for x in "qk"}


def nothing_more(weights: dict[str, Tensor], mixer: Mixer) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Oracle:
    """A mixer's options, and the layer of fla that computes the same, if fla has it."""

    layer: str | None = None  # class in fla.layers
    names: dict[str, str] = field(default_factory=dict)  # our parameter -> theirs
    options: dict[str, Any] = field(default_factory=dict)  # of fla's layer, besides hidden_size
    # Their weights that don't follow from `names`.
    others: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = qkv_conv
    args: dict[str, Any] = field(default_factory=dict)  # of our model
    window: int | None = None
    takes_documents: bool = True

    def model_args(self) -> LoopedTransformerArgs:
        shape = {"dim": DIM, "n_layers": 1, "n_heads": HEADS, "vocab_size": 8}
        shape |= {"norm_eps": EPS, "mixer_norm_eps": EPS}
        return LoopedTransformerArgs(**(shape | self.args))


ORACLES = {
    "full": Oracle(args={"gated_attn": True}),
    "window": Oracle(window=17),
    "gdn": Oracle(
        "GatedDeltaNet",
        QKVO | DECAY | {f"w{x}.weight": f"{x}_proj.weight" for x in "gab"},
        HEADS_AND_NORM | {"head_dim": WIDTH, "expand_v": 1.0},
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
        HEADS_AND_NORM | {"head_dim": WIDTH, "allow_neg_eigval": True},
        args={"kda": KDAArgs(head_dim=WIDTH, allow_neg_eigval=True)},
    ),
    "deltanet": Oracle(
        "DeltaNet",
        QKVO | {"wb.weight": "b_proj.weight"},
        HEADS_AND_NORM,
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
        HEADS_AND_NORM | {"expand_v": 1.0},
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
        HEADS_AND_NORM | {"expand_k": 1.0},
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
        HEADS_AND_NORM | {"expand_ratio": WIDTH},
        others=nothing_more,
    ),
    "mamba2": Oracle(args={"mamba2": Mamba2Args(expand=1.0, head_dim=WIDTH, state_dim=WIDTH)}),
    # All blocks or keys are chosen: near ties are for kernel tests.
    "dsa": Oracle(args={"dsa": DSAArgs(top_k=256)}),
    "nsa": Oracle(
        "NativeSparseAttention",
        {f"w{x}.weight": f"{x}_proj.weight" for x in "vgo"},
        {
            "num_heads": 16,
            "num_kv_heads": 1,
            "head_dim": WIDTH,
            "block_size": 32,
            "block_counts": 16,
            "window_size": 40,
            "rope_theta": 10000.0,
        },
        others=half_split_rotary,
        args={
            "n_heads": 16,
            "head_dim": WIDTH,
            "rope_theta": 10000.0,
            "nsa": NSAArgs(block_size=32, n_blocks=16, window_size=40),
        },
    ),
}


@pytest.fixture(autouse=True)
def attention_for_flas_window(monkeypatch):
    """Replace flash-attn, which computes the window of fla's NSA and may not be installed."""

    def attend(q, k, v, *, causal, window_size):
        assert causal and window_size[1] == 0
        return naive_attention(q.float(), k.float(), v.float(), window=window_size[0] + 1).to(q)

    def attend_packed(q, k, v, *, cu_seqlens_q, cu_seqlens_k, window_size, **_):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        q, k, v = (x[None].float() for x in (q, k, v))
        window = window_size[0] + 1
        return naive_attention(q, k, v, window=window, cu_seqlens=cu_seqlens_q)[0].bfloat16()

    parallel = import_fla("fla.ops.nsa.parallel")
    monkeypatch.setattr(parallel, "flash_attn_func", attend)
    monkeypatch.setattr(parallel, "flash_attn_varlen_func", attend_packed)


def make(name: str) -> Mixer:
    """Make a mixer in fp32, off its initial values; weights that fla has in bf16 are exact."""
    torch.manual_seed(0)
    mixer = build_mixer(MIXERS[name], ORACLES[name].model_args())
    mixer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for parameter_name, p in mixer.named_parameters():
            p += 0.1 * torch.randn_like(p)
            if parameter_name not in DECAY:
                p.copy_(p.bfloat16())
    return mixer.cuda()


def in_bf16(mixer: Mixer) -> Mixer:
    """Cast 2-D parameters to bf16, as in training; 1-D ones stay fp32."""
    mixer = copy.deepcopy(mixer)
    for name, p in mixer.named_parameters():
        if is_matrix(name, p):
            p.data = p.data.bfloat16()
    return mixer


def in_fla(name: str, mixer: Mixer) -> nn.Module:
    oracle = ORACLES[name]
    assert oracle.layer is not None
    layer_class = getattr(import_fla("fla.layers"), oracle.layer)
    layer = layer_class(hidden_size=DIM, **oracle.options)
    ours = {name: p.detach() for name, p in mixer.named_parameters()}
    theirs = {oracle.names[name]: p for name, p in ours.items() if name in oracle.names}
    layer.load_state_dict(theirs | oracle.others(ours, mixer))
    layer.cuda()
    for parameter_name, p in layer.named_parameters():
        if parameter_name not in DECAY:
            p.data = p.data.bfloat16()
    return layer


def by_definition(name: str, mixer: Mixer) -> Callable[..., Tensor]:
    """Return the layer of the paper, one sequence or document at a time, in fp64 on the CPU."""
    definition, oracle = definition_of(name), ORACLES[name]
    assert definition is not None
    weights = {name: p.detach().double().cpu() for name, p in mixer.named_parameters()}

    def layer(x_BTD: Tensor, cu_seqlens: Tensor | None = None, **_: Any) -> Tensor:
        sequences = x_BTD.double().cpu().flatten(0, 1)
        n_tokens = x_BTD.shape[1]
        lengths = cu_seqlens.diff().tolist() if cu_seqlens is not None else [n_tokens] * len(x_BTD)
        args = oracle.model_args()
        outputs = [definition(weights, args, x, oracle.window) for x in sequences.split(lengths)]
        return torch.cat([y[0] if isinstance(y, tuple) else y for y in outputs]).view(x_BTD.shape)

    return layer


def output_and_gradient(layer: Callable[..., Any], x: Tensor, **options: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, **options)
    y = y[0] if isinstance(y, tuple) else y
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    (dx,) = torch.autograd.grad((y * probe).sum(), x)
    return {"output": y.float().cpu(), "gradient of the input": dx.float().cpu()}


@pytest.mark.parametrize("documents", [None, (1, 63, 136)], ids=["dense", "packed"])
@pytest.mark.parametrize("name", ORACLES)
def test_layers_equal_the_definition(name, documents):
    mixer, oracle = make(name), ORACLES[name]
    x = torch.randn(1 if documents else 2, 200, DIM, device="cuda").bfloat16()
    options = {} if documents is None else {"cu_seqlens": packed(documents)}
    want = output_and_gradient(by_definition(name, mixer), x.float(), **options)
    got = {"ours": output_and_gradient(in_bf16(mixer), x, window=oracle.window, **options)}
    if oracle.layer is not None and (documents is None or oracle.takes_documents):
        got["fla"] = output_and_gradient(in_fla(name, mixer), x, **options)
    for whose, results in got.items():
        for what, result in results.items():
            assert_same(result, want[what], BF16_LAYER, f"{whose}: {what}")
