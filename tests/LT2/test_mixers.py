"""What every mixer promises. A new mixer adds rows to CASES and no new test.

Shapes: B sequences, T tokens, D model width. Weights are moved off their initial values, since a
gate that starts at zero would hide what stands behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.LT2.mixers import MIXERS, Mixer
from apps.LT2.mixers.deltanet import DeltaNetArgs
from apps.LT2.mixers.dsa import DSAArgs
from apps.LT2.mixers.gdn import GatedDeltaNetArgs
from apps.LT2.mixers.hgrn2 import HGRN2Args
from apps.LT2.mixers.kda import KDAArgs
from apps.LT2.mixers.mamba2 import Mamba2Args
from apps.LT2.mixers.nsa import NSAArgs
from apps.LT2.mixers.retnet import RetNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from lingua.optim import is_matrix
from tests.tolerances import BF16_LAYER, FP32, FP32_GRAD, assert_same

DIM, HEADS = 32, 2
LENGTHS = [1, 63, 64, 65, 200]


def attention_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """q k and p v over the keys that the tokens see."""
    pairs = sum(min(t + 1, window or seqlen) for t in range(seqlen))
    return 4 * mixer.n_heads * mixer.head_dim * pairs


def delta_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Per token and head: S^T k, k outer write, S^T q; and the convolutions' taps."""
    taps = 0 if mixer.conv.weight is None else 2 * mixer.conv.weight.numel()
    return seqlen * (taps + mixer.n_heads * 6 * mixer.key_dim * mixer.value_dim)


def fading_delta_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """The same, and S decays."""
    decay = mixer.n_heads * mixer.key_dim * mixer.value_dim
    return delta_flops(mixer, seqlen, window) + seqlen * decay


def fading_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """Per token and head: S decays, k outer v, S^T q."""
    return seqlen * mixer.n_heads * 5 * mixer.key_dim * mixer.value_dim


def mamba2_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """The same, D x, and the convolution's taps."""
    taps = 0 if mixer.conv.weight is None else 2 * mixer.conv.weight.numel()
    skip = 2 * mixer.n_heads * mixer.value_dim
    return fading_flops(mixer, seqlen, window) + seqlen * (taps + skip)


def nsa_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """q k and p v over the blocks complete at each token, its chosen blocks and its window."""
    size, pairs = mixer.nsa.block_size, 0
    for t in range(seqlen):
        n_others = min(t // size, mixer.nsa.n_blocks - 1)
        pairs += (t + 1) // size + n_others * size + t % size + 1
        pairs += min(t + 1, mixer.nsa.window_size)
    return 4 * mixer.n_heads * mixer.head_dim * pairs


def nsa_case(n_heads: int, head_dim: int, n_kv_heads: int | None, **sizes: int) -> Case:
    heads = {"n_heads": n_heads, "head_dim": head_dim, "n_kv_heads": n_kv_heads}
    return Case(
        "nsa",
        nsa_flops,
        args={**heads, "nsa": NSAArgs(**sizes)},
        starts_at_zero=frozenset({"wg"}),
        sees_all_past=False,
    )


def dsa_flops(mixer: Any, seqlen: int, window: int | None) -> int:
    """The indexer's products with all keys seen, summed over its heads, and top-k attention."""
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
    without_gradient: frozenset = frozenset()  # parameters that cannot matter here
    starts_at_zero: frozenset = frozenset()  # linears outside the common init rule
    sees_all_past: bool = True  # False: a token may choose among the tokens of its past
    # In fp64 the rounding of one order of summation or the other does not change a choice.
    dtype: torch.dtype = torch.float32
    args_for_bf16: dict = field(default_factory=dict)  # bf16 would change choices: none are made

    def keys_seen(self, t: int) -> int:
        return min(t + 1, self.window or t + 1)


UNUSUAL: dict[str, Any] = {
    "n_heads": 3,
    "head_dim": 8,
    "expand_v": 1.5,
    "conv_size": 2,
    "allow_neg_eigval": True,
}
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
    # Its gates forget half at every token: after 200, fp32 holds nothing of the first.
    "hgrn2": Case("hgrn2", fading_flops, sees_all_past=False),
    "hgrn2_bounded": Case(
        "hgrn2",
        fading_flops,
        args={"hgrn2": HGRN2Args(n_heads=3, head_dim=8, expand_v=1.5, lower_bound=0.9)},
    ),
    "nsa": nsa_case(16, 4, None),
    # 40 tokens are within 4 blocks: what is chosen there does not hang on bf16's rounding.
    "nsa_chooses": nsa_case(16, 4, 1, block_size=10, n_blocks=4, window_size=7),
    "nsa_two_groups": nsa_case(32, 2, 2, block_size=16, n_blocks=5, window_size=1),
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
    "dsa_of_all_keys": Case("dsa", dsa_flops, args={"dsa": DSAArgs(top_k=300)}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Iterator[Case]:
    torch.set_default_dtype(request.param.dtype)
    yield request.param
    torch.set_default_dtype(torch.float32)


def model_args(case: Case) -> LoopedTransformerArgs:
    options = {"n_heads": HEADS} | case.args
    return LoopedTransformerArgs(dim=DIM, n_layers=1, vocab_size=8, **options)


def make(case: Case, *, jitter: float = 0.1) -> Mixer:
    torch.manual_seed(0)
    mixer = MIXERS[case.mixer](model_args(case))
    mixer.reset_parameters(None, 1.0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p += jitter * torch.randn_like(p)
            if name == "A_log" and jitter:
                p[0] = -1.0  # a head that remembers hundreds of tokens: what leaks is seen
    return mixer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(sum(shape)))


def packed(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Documents (T_i, D) in one row, and their boundaries."""
    lengths = torch.tensor([0] + [len(d) for d in documents])
    return torch.cat(documents)[None], lengths.cumsum(0).int()


class Decoder:
    """A mixer with a cache, and the case's window in every call."""

    def __init__(self, case: Case, mixer: Mixer, batch_size: int, max_seqlen: int, dtype=None):
        self.window, self.mixer = case.window, mixer
        self.cache = mixer.init_cache(
            batch_size, max_seqlen, device="cpu", dtype=dtype or case.dtype, window=case.window
        )

    @torch.no_grad()
    def prefill(self, x: Tensor, **options: Any) -> Tensor:
        return self.mixer.prefill(x, self.cache, window=self.window, **options)

    @torch.no_grad()
    def steps(self, x: Tensor) -> Tensor:
        return torch.cat([self.mixer.step(x_B1D, self.cache) for x_B1D in x.split(1, 1)], 1)


def forward_with_loss(mixer: Mixer, x: Tensor, case: Case, cu_seqlens=None) -> tuple[Tensor, Any]:
    """The output, and the mean over tokens of the mixer's own loss, 0 where it has none."""
    options = {"cu_seqlens": cu_seqlens, "window": case.window}
    if mixer.loss_name is None:
        return mixer(x, **options), 0.0
    return mixer.forward_with_loss(x, **options)


def assert_same_fp32(got: Tensor, want: Tensor) -> None:
    assert_same(got, want, FP32)


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_is_causal(case, seqlen):
    mixer, x = make(case), tokens(2, seqlen).requires_grad_()
    out = mixer(x, window=case.window)
    probe = torch.randn(DIM)
    for t in sorted({0, seqlen // 3, seqlen // 2, max(seqlen - 2, 0), seqlen - 1}):
        (grad,) = torch.autograd.grad((out[:, t] @ probe).sum(), x, retain_graph=True)
        reach = grad.abs().amax((0, 2))
        assert not reach[t + 1 :].any(), f"token {t} sees the future"
        first = t + 1 - case.keys_seen(t)
        assert not reach[:first].any(), f"token {t} sees more than its window"
        assert reach[t].all(), f"token {t} does not see itself"
        if case.sees_all_past:
            assert reach[first:t].all(), f"token {t} does not see all of its past"


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_prefill_then_step_equals_forward(case, seqlen):
    mixer, x = make(case), tokens(2, seqlen + 3)
    decoder = Decoder(case, mixer, 2, seqlen + 3)
    got = [decoder.prefill(x[:, :seqlen]), decoder.steps(x[:, seqlen:])]
    assert_same_fp32(torch.cat(got, 1), mixer(x, window=case.window))


def test_steps_alone_equal_forward(case):
    mixer, x = make(case), tokens(2, 14)
    assert_same_fp32(Decoder(case, mixer, 2, 14).steps(x), mixer(x, window=case.window))


@pytest.mark.parametrize(
    "seqlen, split", [(12, s) for s in range(1, 12)] + [(200, s) for s in (1, 63, 64, 65, 136)]
)
def test_prompt_may_be_split_at_any_point(case, seqlen, split):
    mixer, x = make(case), tokens(2, seqlen + 3)
    decoder = Decoder(case, mixer, 2, seqlen + 3)
    got = [
        decoder.prefill(x[:, :split]),
        decoder.prefill(x[:, split:seqlen]),
        decoder.steps(x[:, seqlen:]),
    ]
    assert_same_fp32(torch.cat(got, 1), mixer(x, window=case.window))


def test_prefill_goes_on_after_steps(case):
    mixer, x = make(case), tokens(2, 20)
    decoder = Decoder(case, mixer, 2, 20)
    got = [
        decoder.prefill(x[:, :6]),
        decoder.steps(x[:, 6:9]),
        decoder.prefill(x[:, 9:17]),
        decoder.steps(x[:, 17:]),
    ]
    assert_same_fp32(torch.cat(got, 1), mixer(x, window=case.window))


DOCUMENT_LENGTHS = [5, 1, 64, 1, 65, 2, 63, 3]


@pytest.mark.parametrize("lengths", [DOCUMENT_LENGTHS, [1, 1, 1], [0, 5, 0, 0, 3, 0], [200]])
def test_packed_equals_separate(case, lengths):
    mixer = make(case)
    documents = [tokens(1, n + 2)[0] for n in lengths]
    separate = [mixer(d[None], window=case.window)[0] for d in documents]

    x, cu_seqlens = packed([d[:n] for d, n in zip(documents, lengths, strict=True)])
    want = torch.cat([s[:n] for s, n in zip(separate, lengths, strict=True)])[None]
    assert_same_fp32(mixer(x, cu_seqlens=cu_seqlens, window=case.window), want)

    decoder = Decoder(case, mixer, len(lengths), max(lengths) + 2)
    assert_same_fp32(decoder.prefill(x, cu_seqlens=cu_seqlens), want)
    ends = torch.stack([d[-2:] for d in documents])
    assert_same_fp32(decoder.steps(ends), torch.stack([s[-2:] for s in separate]))


def test_packed_gradients_equal_separate(case):
    mixer = make(case)
    documents = [tokens(1, n)[0].requires_grad_() for n in DOCUMENT_LENGTHS]
    x, cu_seqlens = packed(documents)
    parameters = {n: p for n, p in mixer.named_parameters() if n not in case.without_gradient}
    inputs = {f"document {i}": d for i, d in enumerate(documents)} | parameters
    together, own_loss = forward_with_loss(mixer, x, case, cu_seqlens)
    apart = [forward_with_loss(mixer, d[None], case) for d in documents]
    alone = torch.cat([out for out, _ in apart], 1)
    own_losses = sum(loss * len(d) for (_, loss), d in zip(apart, documents, strict=True))
    probe = torch.randn_like(together)
    got = torch.autograd.grad((together * probe).sum() + own_loss * x.shape[1], inputs.values())
    want = torch.autograd.grad((alone * probe).sum() + own_losses, inputs.values())
    for name, g, w in zip(inputs, got, want, strict=True):
        assert_same(g, w, FP32_GRAD, name)


def test_packed_prompts_continue_their_rows(case):
    """Two packed prefills; some rows are new in the second, and their order is not the cache's."""
    mixer = make(case)
    first, second = {0: 3, 2: 70, 3: 1}, {3: 64, 1: 9, 0: 1, 2: 5}
    streams = [tokens(1, 80 + row)[0] for row in range(4)]
    want = [mixer(s[None], window=case.window)[0] for s in streams]
    decoder = Decoder(case, mixer, 4, 90)
    seen = [0] * 4
    for part in (first, second):
        spans = {row: slice(seen[row], seen[row] + n) for row, n in part.items()}
        x, cu_seqlens = packed([streams[row][span] for row, span in spans.items()])
        got = decoder.prefill(x, cu_seqlens=cu_seqlens, rows=torch.tensor(list(part)))
        assert_same_fp32(got[0], torch.cat([want[row][span] for row, span in spans.items()]))
        for row, n in part.items():
            seen[row] += n
    nexts = torch.stack([streams[row][seen[row] : seen[row] + 3] for row in range(4)])
    wants = torch.stack([want[row][seen[row] : seen[row] + 3] for row in range(4)])
    assert_same_fp32(decoder.steps(nexts), wants)


def test_batch_rows_do_not_mix(case):
    mixer, x = make(case), tokens(3, 70)
    other = x.clone()
    other[1] = tokens(1, 71)[0, :70]
    kept = torch.tensor([0, 2])
    outputs = []
    for batch in (x, other):
        decoder = Decoder(case, mixer, 3, 70)
        cached = [decoder.prefill(batch[:, :66]), decoder.steps(batch[:, 66:])]
        outputs.append((mixer(batch, window=case.window)[kept], torch.cat(cached, 1)[kept]))
    (forward, cached), (forward_other, cached_other) = outputs
    assert torch.equal(forward, forward_other)
    assert torch.equal(cached, cached_other)


def test_one_row_is_refilled_while_the_others_go_on(case):
    mixer = make(case)
    streams, refill = tokens(3, 24), tokens(1, 30)[:, :18]
    want, want_refill = (mixer(s, window=case.window) for s in (streams, refill))
    decoder = Decoder(case, mixer, 3, 24)
    decoder.prefill(streams[:, :10])
    decoder.steps(streams[:, 10:12])

    row = torch.tensor([1])
    decoder.cache.reset(row)
    assert_same_fp32(decoder.prefill(refill[:, :7], rows=row), want_refill[:, :7])
    inputs = streams[:, 12:].clone()
    inputs[1, :11] = refill[0, 7:]
    got = decoder.steps(inputs[:, :11])
    assert_same_fp32(got[[0, 2]], want[[0, 2], 12:23])
    assert_same_fp32(got[1], want_refill[0, 7:])


def test_a_reset_cache_is_empty(case):
    mixer, x = make(case), tokens(2, 12)
    decoder = Decoder(case, mixer, 2, 12)
    decoder.prefill(tokens(2, 11))
    decoder.cache.reset()
    got = torch.cat([decoder.prefill(x[:, :9]), decoder.steps(x[:, 9:])], 1)
    assert_same_fp32(got, mixer(x, window=case.window))


def test_caches_are_written_in_place(case):
    """A captured decode step goes on reading and writing the same addresses."""
    decoder, x = Decoder(case, make(case), 2, 12), tokens(2, 12)

    def addresses() -> list[int]:
        return [t.data_ptr() for t in decoder.cache._tensors()]

    allocated = addresses()
    decoder.prefill(x[:, :4])
    decoder.prefill(x[:, 4:7])
    decoder.steps(x[:, 7:])
    decoder.cache.reset(torch.tensor([0]))
    assert addresses() == allocated


def test_every_parameter_gets_a_gradient(case):
    mixer = make(case, jitter=0.0)
    out, own_loss = forward_with_loss(mixer, tokens(2, 70), case)
    ((out * torch.randn_like(out)).sum() + own_loss).backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if name not in case.without_gradient:
            assert (p.grad != 0).all(), f"part of {name} is not trained"


def test_reset_parameters_fills_every_tensor(case):
    with torch.device("meta"):
        mixer = MIXERS[case.mixer](model_args(case))
    mixer.to_empty(device="cpu")
    filled = []
    for poison in (float("nan"), 7.0):
        with torch.no_grad():
            for tensor in (*mixer.parameters(), *mixer.buffers()):
                tensor.fill_(poison)
        torch.manual_seed(1)
        mixer.reset_parameters(None, 1.0)
        filled.append({name: t.detach().clone() for name, t in mixer.state_dict().items()})
    for name, tensor in filled[0].items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, filled[1][name]), f"{name} depends on what was there before"


@pytest.mark.parametrize("init_std", [None, 0.02])
def test_projections_share_one_init_rule(case, init_std):
    """Spread init_std or fan_in ** -0.5; only the output projection's is divided by the factor."""
    mixer = make(case, jitter=0.0)
    mixer.reset_parameters(init_std, 4.0)
    for name, module in mixer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name in case.starts_at_zero:
            assert not module.weight.any(), name
            continue
        std = init_std or module.in_features**-0.5
        std *= 0.9866 / (4.0 if name == "wo" else 1.0)  # cut at three standard deviations
        n = module.weight.numel()
        assert module.weight.std().item() / std == pytest.approx(1, abs=4 / (2 * n) ** 0.5), name


def test_output_gate_of_attention_is_a_sigmoid_of_its_input():
    mixer, x = make(CASES["full_gqa_gated"]), tokens(1, 9)
    gate, mixer.wg = mixer.wg, None
    heads = []
    mixer.wo.register_forward_pre_hook(lambda m, inputs: heads.append(inputs[0]))
    mixer(x)
    mixer.wg = gate
    want = (heads[0] / (1 + torch.exp(-x @ gate.weight.T))) @ mixer.wo.weight.T
    assert_same_fp32(mixer(x), want)


def test_output_gate_of_attention_starts_half_open():
    mixer = make(CASES["full_gqa_gated"], jitter=0.0)
    plain = make(CASES["full_gqa_gated"], jitter=0.0)
    plain.wg = None
    x = tokens(1, 9)
    assert_same_fp32(mixer(x), plain(x) / 2)


@pytest.mark.parametrize("seqlen", [1, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_what_init_cache_allocates(case, seqlen, dtype):
    mixer = make(case)
    cache = Decoder(case, mixer, 3, seqlen, dtype).cache
    held = [t.nbytes for t in cache._tensors() if t.is_floating_point()]  # no counters
    assert sum(held) == 3 * mixer.state_bytes(seqlen, dtype, case.window)
    assert cache.nbytes() - sum(held) <= 3 * 8  # one int64 counter a row at most


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_flops_are_projections_and_mixing(case, seqlen):
    mixer = make(case)
    projections = sum(2 * m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear))
    mixing = case.mixing_flops(mixer, seqlen, case.window)
    want = projections + mixing / seqlen
    assert mixer.flops_per_token(seqlen, case.window) == pytest.approx(want, abs=1)


def test_half_precision_matrices_beside_fp32_vectors(case):
    """What sharded training and a bf16 decode run: matrices and activations in bf16, decay,
    norms and convolutions in fp32."""
    torch.set_default_dtype(torch.float32)
    case = replace(case, args=case.args | case.args_for_bf16)
    mixer = make(case)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            if is_matrix(name, p):
                p.copy_(p.bfloat16())
    x = tokens(2, 40).bfloat16()
    want = mixer(x.float(), window=case.window).detach()
    for name, p in mixer.named_parameters():
        if is_matrix(name, p):
            p.data = p.data.bfloat16()
    out, own_loss = forward_with_loss(mixer, x, case)
    decoder = Decoder(case, mixer, 2, 40, torch.bfloat16)
    cached = [decoder.prefill(x[:, :30]), decoder.prefill(x[:, 30:36]), decoder.steps(x[:, 36:])]
    (out.float().square().mean() + own_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    for got in (out.detach(), torch.cat(cached, 1)):
        assert got.dtype == torch.bfloat16
        assert_same(got, want, BF16_LAYER)
