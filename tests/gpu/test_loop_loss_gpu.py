"""Compare the losses of all loops on CUDA with the CPU in fp32, from the same states."""

from __future__ import annotations

import copy

import pytest
import torch

from apps.LT2.kernel import linear_cross_entropy as kernel
from tests.LT2.looped_models import VOCAB, make
from tests.tolerances import BF16_LAYER, FP32_MODEL, differences

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, FP32_MODEL), (torch.bfloat16, BF16_LAYER)], ids=str
)
@pytest.mark.parametrize("loop_loss", ["uniform", "gate"])
def test_losses_and_gradients_equal_those_of_a_cpu(loop_loss, dtype, bound, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_TOKENS", 64)  # two and a part
    model = make(loop_count=3, loop_loss=loop_loss, loop_loss_every=3, n_layers=1).to(dtype)
    states = torch.randn(3, 2, 50, model.args.dim).to(dtype)
    target = torch.randint(VOCAB, (2, 50))
    target[:, ::7] = -100
    seen = []
    for device, form in (("cuda", dtype), ("cpu", torch.float32)):
        m = copy.deepcopy(model).to(device=device, dtype=form)
        leaves = [h.to(device, form).requires_grad_() for h in states]
        loss = m.loss_of(leaves[-1], target.to(device), None, leaves)
        loss.backward()
        grads = {f"state {t}": h.grad for t, h in enumerate(leaves)}
        grads |= {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        seen.append({k: v.cpu() for k, v in {"loss": loss, **m.loop_metrics, **grads}.items()})
    assert differences(*seen, bound) == ""
