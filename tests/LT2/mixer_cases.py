"""The mixers under test, in every variant with a different computation.

Shapes: B sequences, T tokens, D model dim. Weights are moved off their initial values: a gate of
zero would hide what it gates.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from apps.LT2.mixers import MIXERS, Mixer, Prompts, build_mixer
from apps.LT2.mixers.deltanet import DeltaNetArgs
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.hgrn2 import HGRN2Args
from apps.LT2.mixers.kda import KDAArgs
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.mixers.retnet import RetNetArgs
from apps.LT2.mixers.rotary import RopeScalingArgs
from apps.LT2.transformer import LoopedTransformerArgs
from tests.tolerances import FP32, assert_same

DIM, HEADS = 32, 2


LENGTHS = [1, 63, 64, 65, 200]


def attention_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Count q k and p v over the visible keys."""
    pairs = sum(min(t + 1, window or seqlen) for t in range(seqlen))
    return 4 * mixer.n_heads * mixer.head_dim * pairs


def delta_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Count, per token and head, S^T k, k outer write, S^T q; and the convolutions."""
    conv = 0 if mixer.conv.weight is None else 2 * mixer.conv.weight.numel()
    return seqlen * (conv + mixer.n_heads * 6 * mixer.key_dim * mixer.value_dim)


def fading_delta_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Count `delta_flops` and the decay of S."""
    decay = mixer.n_heads * mixer.key_dim * mixer.value_dim
    return delta_flops(mixer, seqlen, window) + seqlen * decay


def fading_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Count, per token and head, the decay of S, k outer v and S^T q."""
    return seqlen * mixer.n_heads * 5 * mixer.key_dim * mixer.value_dim


def mamba2_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Count `fading_flops`, D x and the convolution."""
    conv = 0 if mixer.conv.weight is None else 2 * mixer.conv.weight.numel()
    skip = 2 * mixer.n_heads * mixer.value_dim
    return fading_flops(mixer, seqlen, window) + seqlen * (conv + skip)


def nsa_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Count q k and p v over the complete blocks of each token, chosen blocks and window."""
    size, pairs = mixer.nsa.block_size, 0
    for t in range(seqlen):
        n_others = min(t // size, mixer.nsa.n_blocks - 1)
        pairs += (t + 1) // size + n_others * size + t % size + 1
        pairs += min(t + 1, mixer.nsa.window_size)
    return 4 * mixer.n_heads * mixer.head_dim * pairs


def nsa_case(
    n_heads: int,
    head_dim: int,
    n_kv_heads: int | None,
    others: Mapping[str, Any] = MappingProxyType({}),
    **sizes: int,
) -> Case:
    heads = {"n_heads": n_heads, "head_dim": head_dim, "n_kv_heads": n_kv_heads, **others}
    return Case(
        "nsa",
        nsa_flops,
        args={**heads, "nsa": NSAArgs(**sizes)},
        starts_at_zero=frozenset({"wg"}),
        sees_all_past=False,
    )


def dsa_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Count the indexer's products with all visible keys, summed over heads, and attention."""
    seen = sum(t + 1 for t in range(seqlen))
    indexer = mixer.indexer
    return seen * indexer.n_heads * 2 * (indexer.head_dim + 1) + attention_flops(
        mixer, seqlen, mixer.top_k
    )


@dataclass(frozen=True)
class Case:
    mixer: str
    mixing_flops: Callable[[Any, int, int | None], int]  # of a sequence, without projections
    window: int | None = None
    args: dict = field(default_factory=dict)
    without_gradient: frozenset = frozenset()  # parameters without effect here
    starts_at_zero: frozenset = frozenset()  # linears outside the common init rule
    sees_all_past: bool = True  # False: a token may choose among the tokens of its past
    # In fp64 the rounding of a summation order doesn't change a choice.
    dtype: torch.dtype = torch.float32
    args_for_bf16: dict = field(default_factory=dict)  # without choices, which bf16 would change

    def keys_seen(self, t: int) -> int:
        return min(t + 1, self.window or t + 1)


UNUSUAL: dict[str, Any] = {
    "n_heads": 3,
    "head_dim": 8,
    "expand_v": 1.5,
    "conv_size": 2,
    "allow_neg_eigval": True,
}


# The biases of Qwen2 and one of the output, the norms of Qwen3, and a longer context: pairs that
# keep their frequency, that mix, and that are divided.
YARN = RopeScalingArgs(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0
)
QWEN: dict[str, Any] = {"attn_bias": "qkvo", "qk_norm": True, "rope_scaling": YARN}
ONE_KEY = frozenset({"wq.weight", "wk.weight"})  # a softmax over one key is 1


CASES = {
    "full": Case("full", attention_flops),
    "full_gqa_gated": Case(
        "full",
        attention_flops,
        args={"n_kv_heads": 1, "gated_attn": True},
        starts_at_zero=frozenset({"wg"}),
    ),
    "full_wide_heads": Case("full", attention_flops, args={"head_dim": 24}),
    "full_qwen": Case("full", attention_flops, args={"n_kv_heads": 1, **QWEN}),
    "window_1": Case("window", attention_flops, window=1, without_gradient=ONE_KEY),
    "window_5": Case("window", attention_flops, window=5),
    "window_64": Case("window", attention_flops, window=64, args={"n_kv_heads": 1}),
    "window_300": Case("window", attention_flops, window=300),
    "gdn": Case("gdn", fading_delta_flops),
    "gdn_no_conv": Case("gdn", fading_delta_flops, args={"gdn": GatedDeltaNetArgs(conv_size=0)}),
    "gdn_neg_eigval": Case("gdn", fading_delta_flops, args={"gdn": GatedDeltaNetArgs(**UNUSUAL)}),
    "kda": Case("kda", fading_delta_flops),
    "kda_no_conv": Case("kda", fading_delta_flops, args={"kda": KDAArgs(conv_size=0)}),
    "kda_neg_eigval": Case("kda", fading_delta_flops, args={"kda": KDAArgs(**UNUSUAL)}),
    "deltanet": Case("deltanet", delta_flops),
    "deltanet_no_conv": Case("deltanet", delta_flops, args={"deltanet": DeltaNetArgs(conv_size=0)}),
    "deltanet_neg_eigval": Case(
        "deltanet", delta_flops, args={"deltanet": DeltaNetArgs(**UNUSUAL)}
    ),
    "retnet": Case("retnet", fading_flops),
    "retnet_odd_heads": Case(
        "retnet", fading_flops, args={"retnet": RetNetArgs(n_heads=3, head_dim=6, expand_v=1.5)}
    ),
    "mamba2": Case("mamba2", mamba2_flops, args={"mamba2": Mamba2Args(head_dim=16, state_dim=12)}),
    "mamba2_groups_no_conv": Case(
        "mamba2",
        mamba2_flops,
        args={"mamba2": Mamba2Args(1.5, head_dim=8, state_dim=6, n_groups=2, conv_size=0)},
    ),
    "gla": Case("gla", fading_flops),
    # Its gates forget half at every token: after 200 tokens, fp32 holds nothing of the first.
    "hgrn2": Case("hgrn2", fading_flops, sees_all_past=False),
    "hgrn2_bounded": Case(
        "hgrn2",
        fading_flops,
        args={"hgrn2": HGRN2Args(n_heads=3, head_dim=8, expand_v=1.5, lower_bound=0.9)},
    ),
    "nsa": nsa_case(16, 4, None),
    # 40 tokens are 4 blocks, so all are chosen, whatever bf16 rounds.
    "nsa_chooses": nsa_case(16, 4, 1, block_size=10, n_blocks=4, window_size=7),
    "nsa_two_groups": nsa_case(32, 4, 2, QWEN, block_size=16, n_blocks=5, window_size=1),
    "dsa": Case(
        "dsa",
        dsa_flops,
        args={"dsa": DSAArgs(top_k=9, n_index_heads=3, index_head_dim=8)},
        sees_all_past=False,
        dtype=torch.float64,
        args_for_bf16={"dsa": DSAArgs(top_k=40, n_index_heads=3, index_head_dim=8)},
    ),
    "dsa_gqa_gated": Case(
        "dsa",
        dsa_flops,
        args={"n_kv_heads": 1, "gated_attn": True, "dsa": DSAArgs(top_k=64, n_index_heads=1)},
        starts_at_zero=frozenset({"wg"}),
        sees_all_past=False,
        dtype=torch.float64,
    ),
    "dsa_of_all_keys": Case("dsa", dsa_flops, args={"dsa": DSAArgs(top_k=300), **QWEN}),
}


# Another value of each option of a mixer's section, with which its output must change.
OTHER_VALUES: dict[str, dict[str, Any]] = {
    "gdn": UNUSUAL | {"n_heads": 1, "expand_v": 1.0},
    "kda": UNUSUAL | {"n_heads": 1, "expand_v": 2.0},
    "deltanet": UNUSUAL | {"n_heads": 1, "expand_v": 2.0},
    "retnet": {"n_heads": 1, "head_dim": 8, "expand_v": 1.0},
    "mamba2": {"expand": 1.0, "head_dim": 8, "state_dim": 5, "n_groups": 2, "conv_size": 2},
    "hgrn2": {"n_heads": 1, "head_dim": 8, "expand_v": 2.0, "lower_bound": 0.5},
    "gla": {"n_heads": 1, "head_dim": 4, "expand_v": 1.0, "gate_rank": 4},
    "nsa": {"block_size": 8, "n_blocks": 3, "window_size": 9},
    "dsa": {"top_k": 5, "n_index_heads": 2, "index_head_dim": 4, "warmup_steps": 1},
}
# The same for the options that several mixers read. A mixer may allow only some of the values.
OTHER_SHARED_VALUES: dict[str, tuple[Any, ...]] = {
    "n_heads": (4, 32),
    "head_dim": (8,),
    "n_kv_heads": (1,),
    "rope_theta": (99.0,),
    "rope_scaling": (RopeScalingArgs(rope_type="linear", factor=2.0),),
    "gated_attn": (True,),
    "attn_bias": ("qkv",),
    "qk_norm": (True,),
    "mixer_norm_eps": (1e-2,),
    "attn_impl": ("naive",),  # in fp32, so the last bits change
}


def model_args(case: Case) -> LoopedTransformerArgs:
    options = {"n_heads": HEADS} | case.args
    return LoopedTransformerArgs(dim=DIM, n_layers=1, vocab_size=8, **options)


def make(case: Case, *, jitter: float = 0.1) -> Mixer:
    torch.manual_seed(0)
    mixer = build_mixer(MIXERS[case.mixer], model_args(case))
    mixer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p += jitter * torch.randn_like(p)
            if name == "A_log" and jitter:
                p[0] = -1.0  # a head that remembers hundreds of tokens, to reveal leaks
    return mixer


def forward_with_loss(mixer: Mixer, x: Tensor, case: Case, cu_seqlens=None) -> tuple[Tensor, Any]:
    """Return the output and the mixer's own loss, 0 if it has none."""
    options = {"cu_seqlens": cu_seqlens, "window": case.window}
    if mixer.own_loss is None:
        return mixer(x, **options), 0.0
    return mixer.forward_with_loss(x, **options)


def file_of_tests(name: str) -> str:
    return f"tests/LT2/mixers/test_{MIXERS[name].__module__.rpartition('.')[2]}.py"


def definition_of(name: str) -> Callable[..., Any] | None:
    """Return `definition` of the mixer's test file."""
    try:
        module = importlib.import_module(file_of_tests(name).removesuffix(".py").replace("/", "."))
    except ModuleNotFoundError:
        return None
    return getattr(module, "definition", None)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(sum(shape)))


def packed(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pack documents (T_i, D) into one row; return it and cu_seqlens."""
    lengths = torch.tensor([0] + [len(d) for d in documents])
    return torch.cat(documents)[None], lengths.cumsum(0).int()


class Decoder:
    """A mixer with a cache; every call has the case's window."""

    def __init__(self, case: Case, mixer: Mixer, batch_size: int, max_seqlen: int, dtype=None):
        self.window, self.mixer = case.window, mixer
        like = torch.empty(0, dtype=dtype or case.dtype)
        self.cache = mixer.init_cache(batch_size, max_seqlen, like, case.window)

    @torch.no_grad()
    def prefill(self, x: Tensor, **prompts: Any) -> Tensor:
        return self.mixer.prefill(x, self.cache, Prompts(**prompts), self.window)

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        return torch.cat([self.mixer.step(x_B1D, self.cache) for x_B1D in x.split(1, 1)], 1)


def assert_same_fp32(got: Tensor, want: Tensor) -> None:
    assert_same(got, want, FP32)


DOCUMENT_LENGTHS = [5, 1, 64, 1, 65, 2, 63, 3]
