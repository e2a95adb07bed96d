"""The whole model on CUDA in bf16, compiled and not, against the same weights on a CPU in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.optim import is_matrix
from tests.tolerances import BF16_MODEL, assert_same, relative_error

pytestmark = pytest.mark.gpu

VOCAB = 512
MODELS = {
    "full": {"mixer": "full"},
    "window": {"mixer": "window", "default_sliding_window": 17},
    "gdn": {"mixer": "gdn"},
    "hybrid": {"mixer": "gdn", "attention_pattern": "2:1"},
    "per-loop": {"attention_pattern": "16->full"},
}


def make_model(name: str) -> LoopedTransformer:
    torch.manual_seed(0)
    args = LoopedTransformerArgs(
        dim=256,
        n_layers=3,
        n_heads=2,
        vocab_size=VOCAB,
        loop_count=2,
        gated_attn=True,
        multiple_of=64,
        **MODELS[name],
    )
    args.gdn.head_dim = 64  # widths that other tests have tuned already
    args.gdn.expand_v = 1.0
    model = LoopedTransformer(args)
    model.init_weights()
    assert model.rho is not None
    torch.nn.init.normal_(model.rho, std=0.1)
    return model


def on_gpu(model: LoopedTransformer) -> LoopedTransformer:
    """As training holds it: matrices in bf16, vectors in fp32."""
    gpu = copy.deepcopy(model).cuda()
    for name, p in gpu.named_parameters():
        if is_matrix(name, p):
            p.data = p.data.bfloat16()
    return gpu


def loss_and_gradients(model: LoopedTransformer, tokens, cu_seqlens=None):
    loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_cpu_model(name, packed, compiled):
    model = make_model(name)
    gpu = on_gpu(model)
    if compiled:
        torch.compiler.reset()
        for block in gpu.layers:
            block.forward = torch.compile(block.forward, fullgraph=True)
    tokens = torch.randint(VOCAB, (1, 201) if packed else (2, 201))
    bounds = torch.tensor([0, 1, 65, 200], dtype=torch.int32) if packed else None
    want_loss, want = loss_and_gradients(model, tokens, bounds)
    loss, got = loss_and_gradients(gpu, tokens.cuda(), None if bounds is None else bounds.cuda())
    assert abs(loss.item() - want_loss.item()) < 0.02 * want_loss.item()
    for name, grad in got.items():
        assert grad.isfinite().all(), name
        assert_same(grad.cpu(), want[name], BF16_MODEL, name)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_equals_the_full_forward(name):
    model = on_gpu(make_model(name))
    tokens = torch.randint(VOCAB, (2, 90), device="cuda")
    want = model(tokens)
    cache = model.init_cache(2, 100)
    parts = [model.prefill(tokens[:, :67], cache)]
    parts += [model.step(tokens[:, t : t + 1], cache) for t in range(67, 90)]
    error = relative_error(torch.cat(parts, dim=1), want)
    assert error < BF16_MODEL
