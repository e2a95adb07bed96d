"""Sparse attention: special cases, and an indexer that learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apps.LT2.kernel.attention.naive import visible_keys
from apps.LT2.kernel.dsa.selection import head_products, index_scores, select_top_k
from apps.LT2.mixers import Prompts
from apps.LT2.mixers.attention import Attention
from apps.LT2.mixers.dsa import DSAArgs, SparseAttention
from apps.LT2.parallel import get_no_recompute_ops
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.errors import UserError
from lingua.parallel.parallelize import apply_activation_checkpointing
from tests.LT2.mixers.paper import Weights, linear, rms_norm, rotated, softmax_heads
from tests.LT2.tiny import tiny_args
from tests.tolerances import FP32, FP32_GRAD, assert_same

DIM = 16
SHAPE = {"dim": DIM, "n_layers": 1, "n_heads": 2, "vocab_size": 8}


def make(top_k=5, *, n_index_heads=3, index_head_dim=8, warmup_steps=0, **shape):
    torch.manual_seed(0)
    dsa = DSAArgs(top_k, n_index_heads, index_head_dim, warmup_steps)
    mixer = SparseAttention(LoopedTransformerArgs(**(SHAPE | shape)), dsa)
    mixer.reset_parameters(None, 1.0)
    if mixer.wg is not None:
        torch.nn.init.normal_(mixer.wg.weight)
    return mixer


def as_attention(mixer: SparseAttention, **shape) -> Attention:
    """Return full attention with the same weights."""
    attention = Attention(LoopedTransformerArgs(**(SHAPE | shape)))
    weights = {n: w for n, w in mixer.state_dict().items() if not n.startswith("indexer.")}
    attention.load_state_dict(weights)
    return attention


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(sum(shape)))


def definition(weights: Weights, args, x_TD: Tensor, window: int | None = None):
    """Return the output, and the mean over tokens of KL(p || softmax I) over the chosen keys."""
    own = args.dsa
    heads = softmax_heads(weights, args, x_TD, args.n_kv_heads or args.n_heads)
    scores_TS = indexer_scores(weights, args, x_TD.detach())
    o, losses = [[] for _ in heads], []
    for t in range(len(x_TD)):
        ranked = sorted(range(t + 1), key=lambda s: (-scores_TS[t, s].item(), -s))  # noqa: B023
        chosen = ranked[: own.top_k]
        target = 0
        for h, (q, k, v) in enumerate(heads):
            p = (k[chosen] @ q[t] * q.shape[1] ** -0.5).softmax(0)
            o[h].append(p @ v[chosen])
            target = target + p.detach() / len(heads)
        guess = scores_TS[t, chosen].log_softmax(0)
        losses.append((target * (target.log() - guess)).sum())
    o_TC = torch.cat([torch.stack(head) for head in o], dim=-1)
    if args.gated_attn:
        o_TC = o_TC * torch.sigmoid(x_TD @ weights["wg.weight"].T)
    return linear(weights, "wo", o_TC)[0], torch.stack(losses).mean()


def indexer_scores(weights: Weights, args, x_TD: Tensor) -> Tensor:
    """Compute I(t, s) = sum_j w(t, j) ReLU(q(t, j) . k(s)) / sqrt(J C), with rotated q and k."""
    J, C = args.dsa.n_index_heads, args.dsa.index_head_dim
    (k,), (w_TJ,) = linear(weights, "indexer.wk", x_TD), linear(weights, "indexer.ww", x_TD)
    turn = args.rope_theta, args.rope_scaling
    k = rotated(rms_norm(weights, "indexer.k_norm", k, args.norm_eps), *turn)
    scores = 0
    for j, q in enumerate(linear(weights, "indexer.wq", x_TD, J)):
        products = rotated(q, *turn) @ k.T
        scores = scores + w_TJ[:, j, None] * products.relu() * (J * C) ** -0.5
    return scores


GATED_GQA = {"n_kv_heads": 1, "gated_attn": True}


@pytest.mark.parametrize("shape", [{}, GATED_GQA], ids=["plain", "gated gqa"])
def test_it_is_full_attention_if_all_keys_are_selected(shape):
    mixer, x = make(top_k=40, **shape), tokens(2, 40)
    want = as_attention(mixer, **shape)(x)
    assert torch.equal(mixer(x), want)
    assert_same(mixer.forward_with_loss(x)[0], want, FP32)


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, GATED_GQA], ids=["plain", "gated gqa"])
def test_it_is_a_window_if_all_scores_are_zero(shape):
    """The last top_k keys are selected, in forward, prefill and steps."""
    mixer, x = make(top_k=5, **shape), tokens(2, 40)
    mixer.indexer.ww.weight.zero_()
    want = as_attention(mixer, **shape)(x, window=5)
    assert_same(mixer(x), want, FP32)
    cache = mixer.init_cache(2, 40, like=x)
    parts = [mixer.prefill(part, cache, Prompts()) for part in (x[:, :11], x[:, 11:30])]
    parts += [mixer.step(x[:, t : t + 1], cache) for t in range(30, 40)]
    assert_same(torch.cat(parts, 1), want, FP32)


def test_each_loss_trains_only_its_own_weights():
    mixer, x = make(), tokens(2, 40).requires_grad_()
    out, loss = mixer.forward_with_loss(x)
    own = set(mixer.indexer.parameters())
    weights = dict(mixer.named_parameters())
    assert {n for n, p in weights.items() if p in own} == {
        n for n in weights if n.startswith("indexer.")
    }
    inputs = [x, *weights.values()]
    by_out = torch.autograd.grad(out.sum(), inputs, allow_unused=True, retain_graph=True)
    by_loss = torch.autograd.grad(loss, inputs, allow_unused=True)
    for p, a, b in zip(inputs, by_out, by_loss, strict=True):
        assert (a is None) == (p in own) and (b is None) == (p not in own)


def test_a_token_attends_to_at_most_top_k_keys():
    mixer, x = make(top_k=5), tokens(1, 40).requires_grad_()
    out = mixer(x)
    for t in (3, 20, 39):
        (grad,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        others = (grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
        assert len(set(others) - {t}) <= 5 and max(others) == t


def test_attention_is_dense_only_in_warm_up():
    mixer, x = make(warmup_steps=3), tokens(2, 40)
    dense, sparse = as_attention(mixer)(x), mixer(x)
    assert (dense - sparse).norm() > 0.1 * dense.norm()
    for step, want in ((0, dense), (2, dense), (3, sparse), (1, dense), (None, sparse)):
        mixer.begin_step(step)
        assert_same(mixer(x), want, FP32)
        assert_same(mixer.forward_with_loss(x)[0], want, FP32)


# ---- learning


def keys_found(mixer: SparseAttention, x: Tensor) -> float:
    """Return the share of the top_k keys with the most attention that the indexer selects.

    Only tokens that see at least 4 top_k keys count.
    """
    n_tokens, top_k = x.shape[1], mixer.top_k
    positions = torch.arange(n_tokens)
    visible = visible_keys(n_tokens, window=None, cu_seqlens=None, device="cpu")
    q, k, _ = mixer._qkv(x, positions)
    logits = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    attention = logits.masked_fill(~visible, -torch.inf).softmax(-1).sum(1)
    index = mixer.indexer(x, positions)
    found = select_top_k(index_scores(head_products(index), index.w_BTJ), visible, top_k)
    wanted = select_top_k(attention, visible, top_k)
    late = slice(4 * top_k, None)
    return ((found & wanted)[:, late].sum() / wanted[:, late].sum()).item()


@pytest.mark.parametrize("warmup_steps", [100, 1000], ids=["warm-up, then sparse", "warm-up"])
def test_the_indexer_learns_to_select_the_most_attended_keys(warmup_steps):
    """One random attention head over random tokens; only the indexer is trained."""
    mixer = make(top_k=8, n_index_heads=4, index_head_dim=DIM, warmup_steps=warmup_steps, n_heads=1)
    optimizer = torch.optim.Adam(mixer.indexer.parameters(), lr=1e-2)

    def batch() -> Tensor:
        x = torch.randn(4, 64, DIM)
        x[..., 0] = 2.0  # a shared feature, as in a real model: w can be positive for all
        return x

    x = batch()
    assert keys_found(mixer, x) < 0.3  # chance is 8 keys of 32 to 64
    for step in range(300):
        mixer.begin_step(step)
        _, loss = mixer.forward_with_loss(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert keys_found(mixer, x) > 0.9


# ---- in the model


@pytest.mark.parametrize("mode", ["full", "selective", "loop"])
@pytest.mark.parametrize("kind", ["dsa", "gdn+dsa"])
def test_recomputation_gives_the_same_gradients(kind, mode):
    grads = []
    for how in ("none", mode):
        torch.manual_seed(0)
        model = LoopedTransformer(tiny_args(kind, 2))
        model.init_weights()
        model.checkpoint_loops = how == "loop"
        for block in model.layers:
            apply_activation_checkpointing(block, how, get_no_recompute_ops())
        text = torch.randint(258, (2, 31), generator=torch.Generator().manual_seed(0))
        model(text[:, :-1], text[:, 1:]).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert model.mixer_losses["dsa_indexer"] > 0
    for name, grad in grads[0].items():
        assert grad.any(), name
        assert torch.equal(grads[1][name], grad), name


def test_a_block_compiles_whole():
    """One graph for the forward and one for the backward, in warm-up and after."""
    torch.manual_seed(0)
    model = LoopedTransformer(tiny_args("dsa", 1, dsa=DSAArgs(4, 1, 8, warmup_steps=1)))
    model.init_weights()
    block, spec = model.layers[0], model.layout[0][0]
    h = torch.randn(1, 30, 32, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 30], dtype=torch.int32)
    torch.compiler.reset()
    compiled = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    inputs = [h, *block.parameters()]
    for step in (0, 1):
        model.begin_step(step)
        grads = []
        for forward in (block, compiled):
            out, loss = forward(h, spec, cu_seqlens, True)
            grads.append(torch.autograd.grad(out.square().sum() + loss, inputs))
        for got, want in zip(*grads, strict=True):
            assert_same(got, want, FP32_GRAD)


def test_validation_has_no_indexer_loss():
    torch.manual_seed(0)
    model = LoopedTransformer(tiny_args("dsa", 2))
    model.init_weights()
    text = torch.randint(258, (2, 31))
    with torch.no_grad():
        model(text[:, :-1], text[:, 1:])
    assert model.mixer_losses == {}
    assert model.own_loss_parameters().keys() == {"dsa_indexer"}
    n_own = len(model.own_loss_parameters()["dsa_indexer"])
    assert n_own == 3 * 4  # wq, wk, ww and a norm in each layer


# ---- mistakes


@pytest.mark.parametrize(
    "option, value",
    [
        ("top_k", 0),
        ("n_index_heads", 0),
        ("index_head_dim", 0),
        ("index_head_dim", 7),
        ("warmup_steps", -1),
    ],
)
def test_wrong_options_are_user_errors(option, value):
    with pytest.raises(UserError, match=rf"model\.dsa\.{option}={value}"):
        DSAArgs(**{option: value})


def test_an_odd_head_dim_is_a_user_error():
    with pytest.raises(UserError, match="model.head_dim=5"):
        make(head_dim=5)
