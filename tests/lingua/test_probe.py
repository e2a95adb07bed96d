"""A probe records the values and gradients of autograd, for every call, and changes nothing."""

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lingua import probe as probe_module
from lingua.probe import QUANTILES, Probe, log_stats


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(4, 4, bias=False)
        self.wk = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        x = log_stats(x, "resid")
        return torch.tanh(self.wq(x)) * self.wk(x)


class Looped(nn.Module):
    def __init__(self, loops=1, recompute=False):
        super().__init__()
        self.loops, self.recompute = loops, recompute
        self.block = Block()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(self.loops):
            if self.recompute:
                x = x + checkpoint(self.block, x, use_reentrant=False)
            else:
                x = x + self.block(x)
        return self.head(x).square().sum()


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 5, 4, requires_grad=True)


def gradients(model, x):
    loss = model(x)
    grads = torch.autograd.grad(loss, [x, *model.parameters()])
    return [loss, *grads]


def probed(model, x, **kwargs):
    probe = Probe(model, **kwargs)
    with probe:
        model(x).backward()
    return probe.results


def test_values_and_gradients_match_autograd(x):
    torch.manual_seed(1)
    model = Looped()
    results = probed(model, x)

    block, head = model.block, model.head
    q_in, k_in, head_w = x.detach().requires_grad_(), x.detach().requires_grad_(), head.weight
    q = block.wq(q_in)
    h = x.detach() + torch.tanh(q) * block.wk(k_in)
    out = head(h)
    loss = out.square().sum()
    dq_in, dk_in, dq, dout, dw = torch.autograd.grad(loss, [q_in, k_in, q, out, head_w])
    want = {
        "block.wq::in": x,
        "block.wq::w": block.wq.weight,
        "block.wq::out": q,
        "block.wq::in.g": dq_in,  # only of this use, though wk reads the same tensor
        "block.wk::in.g": dk_in,
        "block.wq::out.g": dq,
        "block::resid": x,
        "block::resid.g": dq_in + dk_in,  # without the residual connection
        "head::out": out,
        "head::out.g": dout,
        "head::w.g": dw,
    }
    for key, tensor in want.items():
        got = results[key]
        assert got["shape"] == list(tensor.shape), key
        assert got["mean"] == pytest.approx(tensor.mean().item(), rel=1e-4, abs=1e-6), key
        assert got["max"] == pytest.approx(tensor.max().item(), rel=1e-5), key
    linears = ["block.wq", "block.wk", "head"]
    names = ["in", "w", "out", "in.g", "w.g", "out.g"]
    assert set(results) == {f"{p}::{n}" for p in linears for n in names} | {
        "block::resid",
        "block::resid.g",
    }


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_statistics(monkeypatch, chunk):
    monkeypatch.setattr(probe_module, "CHUNK", chunk)
    torch.manual_seed(0)
    x = torch.randn(101).exp()
    got = probe_module._Stats(x).as_dict()
    d = x.double() - x.double().mean()
    std = d.square().mean().sqrt()
    assert got["shape"] == [101]
    assert got["std"] == pytest.approx(std.item(), rel=1e-5)
    assert got["skew"] == pytest.approx(((d / std) ** 3).mean().item(), rel=1e-4)
    assert got["kurtosis"] == pytest.approx(((d / std) ** 4).mean().item(), rel=1e-4)
    assert got["abs.mean"] == pytest.approx(x.abs().mean().item(), rel=1e-5)
    assert (got["min"], got["max"]) == (x.min().item(), x.max().item())
    want = torch.quantile(x, torch.tensor(QUANTILES)).tolist()
    assert len(QUANTILES) == 19 and got["quantiles"] == pytest.approx(want)


def test_sampled_quantiles_are_close(monkeypatch):
    monkeypatch.setattr(probe_module, "QUANTILE_SAMPLE", 1000)
    got = probe_module._Stats(torch.linspace(0, 1, 10_001)).as_dict()
    assert got["quantiles"] == pytest.approx(QUANTILES, abs=2e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_each_loop_has_a_key(x, recompute):
    model = Looped(loops=3, recompute=recompute)
    results = probed(model, x)
    block_in = {key for key in results if key.startswith("block.wq") and key.endswith("::in")}
    assert block_in == {"block.wq[0]::in", "block.wq[1]::in", "block.wq[2]::in"}
    assert {"block[2]::resid", "block[2]::resid.g", "block.wq[2]::out.g"} <= set(results)
    assert {"block.wq::w", "block.wq::w.g", "head::in"} <= set(results)

    seen, h = [], x.detach()
    with torch.no_grad():
        for _ in range(3):
            seen.append(h.mean().item())
            h = h + model.block(h)
    got = [results[f"block.wq[{k}]::in"]["mean"] for k in range(3)]
    assert got == pytest.approx(seen, rel=1e-4)
    want = model.block.wq.weight.grad  # the sum over the loops
    assert want is not None
    assert results["block.wq::w.g"]["abs.mean"] == pytest.approx(want.abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_probe_changes_nothing(x, recompute):
    model = Looped(loops=2, recompute=recompute)
    want = gradients(model, x)
    with Probe(model):
        seen = gradients(model, x)
    after = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(after, want, strict=True))
    assert torch.equal(seen[0], want[0])
    # Gradients of several uses are summed in another order.
    torch.testing.assert_close(seen, want, rtol=1e-5, atol=1e-5)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(hooks) and not model.head.weight._backward_hooks


def test_lines_are_strict_json(x, tmp_path):
    model = Looped()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    path = tmp_path / "probe" / "probe.0.jsonl"
    probe = Probe(model, path)
    for step in 1, 2:
        probe.metadata = {"it": step, "global_step": step, "loop": "lt2"}
        with probe:
            model(x).backward()
    lines = path.read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert set(first) == {"data", "meta", "version", "quantiles"}
    assert (first["meta"]["it"], second["meta"]["it"]) == (1, 2)
    assert first["data"]["head::out"]["mean"] is None
    assert first["data"]["head::in"] == second["data"]["head::in"]


def test_no_gradient_records_without_grad(x):
    model = Looped()
    probe = Probe(model)
    with torch.no_grad(), probe:
        model(x)
    assert "head::out" in probe.results
    assert not [key for key in probe.results if key.endswith(".g")]


def test_compiled_model_is_recorded(x):
    model = Looped(loops=2)
    model.block.compile(backend="eager")
    model(x)
    assert "block.wq[1]::in" in probed(model, x)


def test_model_is_restored_after_an_error(x):
    model = Looped()
    with pytest.raises(RuntimeError), Probe(model):
        model(x[..., :2])
    assert log_stats(x, "nothing is open") is x
    assert probed(model, x)


def test_empty_and_constant_tensors():
    assert probe_module._Stats(torch.empty(0, 3)).as_dict() == {"shape": [0, 3]}
    constant = probe_module._Stats(torch.full((4,), 2.0, dtype=torch.bfloat16)).as_dict()
    assert constant["mean"] == 2.0 and constant["std"] == 0.0
