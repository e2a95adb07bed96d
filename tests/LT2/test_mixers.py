"""The contract of every mixer: forward, weights, costs.

A new mixer adds rows to CASES in mixer_cases.py, and no test here. test_mixer_contract.py checks
that it has them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from apps.LT2.mixers import MIXERS, build_mixer
from lingua.optim import is_matrix
from tests.LT2.mixer_cases import (
    DIM,
    DOCUMENT_LENGTHS,
    LENGTHS,
    Decoder,
    forward_with_loss,
    make,
    model_args,
    packed,
    tokens,
)
from tests.tolerances import BF16_LAYER, FP32_GRAD, assert_same


@pytest.mark.parametrize("seqlen", [1, 64, 65, 200])
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
        mixer = build_mixer(MIXERS[case.mixer], model_args(case))
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
    zero = {name for name, tensor in filled[0].items() if not tensor.any()}
    assert zero == filled[0].keys() & set(mixer.zero_at_start)


@pytest.mark.parametrize("init_std", [None, 0.02])
def test_projections_share_one_init_rule(case, init_std):
    """The std is init_std or fan_in ** -0.5; only that of wo is divided by the factor."""
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


def test_flops_are_projections_and_mixing(case):
    mixer = make(case)
    projections = sum(2 * m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear))
    for seqlen in LENGTHS:
        want = projections + case.mixing_flops(mixer, seqlen, case.window) / seqlen
        got = mixer.flops_per_token(seqlen, case.window)
        assert got == pytest.approx(want, abs=1), seqlen


def test_bf16_matrices_with_fp32_vectors(case):
    """As in sharded training and bf16 decoding: 2-D parameters and activations are bf16."""
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
