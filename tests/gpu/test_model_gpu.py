"""The model on CUDA in bf16, compiled and eager, against the same weights on a CPU in fp32."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from apps.LT2.mixers import dsa, nsa
from apps.LT2.mixers.linear import LinearMixer
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.optim import is_matrix
from tests.tolerances import BF16_KERNEL, relative_error

pytestmark = pytest.mark.gpu

VOCAB = 512
MODELS = {
    "full": {"mixer": "full"},
    "window": {"mixer": "window", "default_sliding_window": 17},
    "gdn": {"mixer": "gdn"},
    "kda": {"mixer": "kda"},
    "mamba2": {"mixer": "mamba2"},
    "hgrn2": {"mixer": "hgrn2"},
    "deltanet": {"mixer": "deltanet"},
    "nsa": {
        "mixer": "nsa",
        "n_heads": 16,
        # All blocks are chosen, and fewer than all keys: no choice depends on bf16's rounding.
        "nsa": nsa.NSAArgs(block_size=32, n_blocks=8, window_size=50),
    },
    "retnet": {"mixer": "retnet"},
    "gla": {"mixer": "gla"},
    "hybrid": {"mixer": "gdn", "attention_pattern": "2:1"},
    "per-loop": {"attention_pattern": "16->full"},
    "dsa": {"mixer": "dsa", "dsa": dsa.DSAArgs(top_k=256)},
    "gdn+dsa": {
        "mixer": "gdn",
        "hybrid_mixer": "dsa",
        "attention_pattern": "2:1",
        "dsa": dsa.DSAArgs(top_k=256),
    },
}


def make_model(name: str) -> LoopedTransformer:
    torch.manual_seed(0)
    options = {"n_heads": 2} | MODELS[name]
    args = LoopedTransformerArgs(
        dim=256,
        n_layers=3,
        vocab_size=VOCAB,
        loop_count=2,
        gated_attn=True,
        multiple_of=64,
        **options,
    )
    args.gdn.head_dim = 64  # dims that other tests compile too
    args.gdn.expand_v = 1.0
    model = LoopedTransformer(args)
    model.init_weights()
    assert model.rho is not None
    torch.nn.init.normal_(model.rho, std=0.1)
    if name == "retnet":
        # The first token of a document gives v (q . k), and the norm divides by it: where q . k is
        # near 0, its gradient is rounding noise. Without rotation, q = k makes it positive.
        for block in model.layers:
            block.mixers()[0].wq.weight.data.copy_(block.mixers()[0].wk.weight.data)
    return model


def on_gpu(model: LoopedTransformer) -> LoopedTransformer:
    """Cast 2-D parameters to bf16, as in training; 1-D ones stay fp32."""
    gpu = copy.deepcopy(model).cuda()
    for name, p in gpu.named_parameters():
        if is_matrix(name, p):
            p.data = p.data.bfloat16()
    return gpu


def loss_and_gradients(model: LoopedTransformer, tokens, cu_seqlens=None):
    loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def in_plain_torch(model: LoopedTransformer, monkeypatch) -> LoopedTransformer:
    """Run the bf16 model without kernels: its error is rounding alone."""
    for block in model.layers:
        for mixer in block.mixers():
            if hasattr(mixer, "attn_impl"):
                mixer.attn_impl = "naive"
            if isinstance(mixer, LinearMixer):
                plain = partial(mixer.recurrence, impl="chunked")
                monkeypatch.setattr(mixer, "recurrence", plain)
    for module, name in ((nsa, "native_sparse_attention"), (dsa, "dsa")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), impl="blocked"))
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_and_compilation_add_no_error_to_that_of_bf16(name, packed):
    model = make_model(name)
    tokens = torch.randint(VOCAB, (1, 201) if packed else (2, 201))
    cu_seqlens = torch.tensor([0, 1, 65, 200], dtype=torch.int32) if packed else None
    want_loss, want = loss_and_gradients(model, tokens, cu_seqlens)
    tokens, cu_seqlens = tokens.cuda(), None if cu_seqlens is None else cu_seqlens.cuda()

    with pytest.MonkeyPatch.context() as monkeypatch:
        plain = in_plain_torch(on_gpu(model), monkeypatch)
        plain_loss, plain_grads = loss_and_gradients(plain, tokens, cu_seqlens)
    eager = on_gpu(model)
    compiled = on_gpu(model)
    torch.compiler.reset()
    for block in compiled.layers:
        block.forward = torch.compile(block.forward, fullgraph=True)

    loss_floor = abs(plain_loss.item() - want_loss.item())
    for how, gpu in (("eager", eager), ("compiled", compiled)):
        loss, grads = loss_and_gradients(gpu, tokens, cu_seqlens)
        assert abs(loss.item() - want_loss.item()) <= 2 * loss_floor + BF16_KERNEL, how
        for name, grad in grads.items():
            if name.endswith(("A_log", "dt_bias")):
                continue  # sums of dg over all tokens that cancel; dg is tested at the operator
            error = relative_error(grad.cpu(), want[name])
            floor = relative_error(plain_grads[name].cpu(), want[name])
            assert error <= 2 * floor + BF16_KERNEL, f"{how} {name}: {error:.2e}, floor {floor:.2e}"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_decoding_equals_the_full_forward(name):
    model = make_model(name)
    tokens = torch.randint(VOCAB, (2, 90))
    want = model(tokens)
    gpu, tokens = on_gpu(model), tokens.cuda()
    floor = relative_error(gpu(tokens).cpu(), want)
    cache = gpu.init_cache(2, 100)
    parts = [gpu.prefill(tokens[:, :67], cache)]
    parts += [gpu.step(tokens[:, t : t + 1], cache) for t in range(67, 90)]
    error = relative_error(torch.cat(parts, dim=1).cpu(), want)
    assert error <= 2 * floor
