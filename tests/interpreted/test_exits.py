"""The kernels of early exits against their torch forms."""

from __future__ import annotations

import pytest
import torch

from apps.LT2.kernel.exit_gate import exit_by_gate
from apps.LT2.kernel.exit_gate.triton import launch
from apps.LT2.kernel.exit_kl import kl_of_logits
from apps.LT2.kernel.exit_kl.triton import launch as kl_launch
from apps.LT2.kernel.skipped_loops import SlotCopy
from apps.LT2.kernel.skipped_loops.naive import copy_slots_naive
from apps.LT2.kernel.skipped_loops.triton import launch_copies, launch_updates
from apps.LT2.mixers.gdn import GatedDeltaNet, GatedDeltaNetArgs
from apps.LT2.transformer import LoopedTransformerArgs
from tests.tolerances import FP32, assert_same


def upload(numbers, device) -> torch.Tensor:
    return torch.tensor(numbers)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("D, dtype", [(24, torch.float32), (70, torch.float16)], ids=str)
def test_decision_of_the_gate(D, dtype, first):
    torch.manual_seed(0)
    h, held = torch.randn(2, 9, D).to(dtype)
    left, stay = torch.rand(9) < 0.4, -torch.rand(9)
    norm, weight, bias = torch.rand(D) + 0.5, torch.randn(D), torch.randn(1)
    before = (torch.zeros_like(left), None) if first else (left, stay)
    gate, held = (norm, 1e-6, weight, bias), None if first else held
    want = exit_by_gate(h, *before, *gate, 0.6, held_ND=held, impl="torch")
    got = launch(h, *before, *gate, torch.tensor(0.4).log().item(), held)
    assert 0 < want[1].sum() < 9
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert_same(got[2], want[2], FP32, "log p(no exit)")


@pytest.mark.parametrize("V", [7, 5000])
def test_kl_of_logits(V):
    torch.manual_seed(0)
    before = 3 * torch.randn(3, 2, V) + 50
    after = before + 0.1 * torch.randn(3, 2, V) - 20
    want = kl_of_logits(before.double(), after.double(), impl="torch").float()
    got = kl_launch(before.flatten(0, 1), after.flatten(0, 1)).view(3, 2)
    assert (got - want).abs().max() < 1e-6 and want.min() > 1e-4


def test_copies_to_caches_of_skipped_loops():
    """Two rings and caches of other slots and sizes, in one call."""
    torch.manual_seed(0)
    length_B, forms = torch.tensor([5, 9]), [(12, 2, 5), (4, 2, 5), (12, 1030)]
    source_of = [torch.randn(2, *form) for form in forms]
    copies = [
        SlotCopy(source, torch.randn(2, n, *source.shape[2:]), length_B, length_B - 1)
        for source in source_of
        for n in (12, 4)
    ]
    want = [SlotCopy(*(x.clone() for x in copy)) for copy in copies]
    copy_slots_naive(want)
    launch_copies(copies, upload)
    for got, expected in zip(copies, want, strict=True):
        assert all(map(torch.equal, got, expected))
    row, position = 1, 8
    assert torch.equal(copies[1].slots[row, position % 4], source_of[0][row, position])
    assert copies[1].length_B.tolist() == [5, 9]


@pytest.mark.parametrize("neg_eigval, V", [(False, 24), (True, 100)])
def test_updates_of_gated_delta_net(neg_eigval, V):
    """Two layers with two skipped loops each, against a step of each."""
    torch.manual_seed(0)
    args = LoopedTransformerArgs(dim=36, n_heads=3)
    options = GatedDeltaNetArgs(head_dim=12, expand_v=V / 12, allow_neg_eigval=neg_eigval)
    updates, want = [], []
    for _ in range(2):
        layer = GatedDeltaNet(args, options).requires_grad_(False)
        layer.reset_parameters(None, 1.0)
        streams = torch.randn(2, layer.conv.channels)
        product = torch.randn(2, 3 * V + 6)
        rest = product.split([3 * V, 3, 3], dim=-1)
        for _ in range(2):
            cache, expected = (layer.init_cache(2, 8, torch.zeros(1)) for _ in range(2))
            for got, other in zip(cache._tensors(), expected._tensors(), strict=True):
                got.normal_()
                other.copy_(got)
            updates.append(layer.skipped_update(streams, rest, cache))
            assert expected.conv_state_BTC is not None
            layer.step_heads(layer.conv.step(streams, expected.conv_state_BTC), rest, expected)
            want.append(expected)
    launch_updates(updates, upload)
    for update, expected in zip(updates, want, strict=True):
        assert torch.equal(update.conv_state_BSC, expected.conv_state_BTC)
        assert_same(update.state_BHKV, expected.state_BHKV, FP32, "state")
