"""The loss of every loop, against the plain form: all logits, and autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apps.LT2.flops import count_parameters, head_flops, step_flops_per_token
from apps.LT2.kernel import linear_cross_entropy as kernel
from apps.LT2.loop_loss import check_exits, log_exit_distribution
from apps.LT2.memory import training_memory
from apps.LT2.transformer import LoopedTransformer, build_on_meta
from lingua.errors import UserError
from lingua.parallel.args import DistributedArgs
from tests.LT2.looped_models import VOCAB, make, packed, prompt
from tests.LT2.tiny import DSA
from tests.waiting import no_waiting

T, DIM = 3, 32
LOSSES: list[Any] = ["uniform", [1, 0, 2.5], "gate"]
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "own loss": {"mixer": "dsa", "dsa": DSA},
    "tied": {"weight_tying": True, "mixer": "gdn"},
    "bptt 1": {"loop_bptt": 1},
    "bptt 2": {"loop_bptt": 2, "use_residual": False},
    "2 loops": {"loop_schedule": "2@0"},
    "1 loop": {"loop_schedule": "1@0"},
    "every 3": {"loop_loss_every": 3},
    "segments": {"attention_pattern": "gdn->full->gdn"},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_TOKENS", 4)


def targets(tokens: Tensor) -> Tensor:
    target = tokens.roll(-1, 1)
    target[:, -2:] = -100
    return target


def plain(model: LoopedTransformer, tokens: Tensor, target: Tensor, cu_seqlens: Tensor | None):
    """Return the loss with all its gradients, the loops' losses and the mean exits, by the book."""
    args, n_loops = model.args, model.n_loops
    h, own, nats, leaves = model.tok_embeddings(tokens), [], [], []
    for t in range(n_loops):
        if t == n_loops - model.n_backward_loops(n_loops) and args.loop_bptt:
            h, own = h.detach(), []
        u = h
        for block, spec in zip(model.layers, model.layout[t], strict=True):
            h, own_loss = block(h, spec, cu_seqlens, True)
            own += [] if own_loss is None else [own_loss]
        h = h if model.rho is None else h + model.rho[t] * u
        state = h.detach() if args.loop_bptt and t < n_loops - args.loop_bptt else h
        logits = F.linear(model.norm(state), model.head_weight)
        nats.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none"))
        if model.exit_gate is not None:
            logit = model.norm(state) @ model.exit_gate.weight + model.exit_gate.bias
            leaves.append(torch.sigmoid(logit).flatten())
    every, place = args.loop_loss_every, torch.arange(target.numel())
    sample = (place % every == model.loop_loss_offset) * every
    nats = [each * sample for each in nats[:-1]] + nats[-1:]
    n = (target != -100).sum()
    losses = [each.sum() / n for each in nats]
    if not leaves:
        weights = [1.0] * T if args.loop_loss == "uniform" else args.loop_loss
        weights = torch.tensor(weights[:n_loops]) / sum(weights[:n_loops])
        return (weights * torch.stack(losses)).sum(), own, losses, []
    exits, stays = [], torch.ones_like(leaves[0])
    for leave in leaves[:-1]:
        exits.append(stays * leave)
        stays = stays * (1 - leave)
    exits.append(stays)
    p = torch.stack(exits)
    kept = (target != -100).flatten()
    each = (p * torch.stack(nats)).sum(0) + args.loop_entropy * torch.xlogy(p, p).sum(0)
    return each[kept].mean(), own, losses, [q[kept].mean() for q in p]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("loop_loss", LOSSES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_plain_form(kind, loop_loss, documents):
    model = make(loop_count=T, loop_loss=loop_loss, loop_entropy=0.7, **KINDS[kind])
    model.begin_step(4, 5)
    tokens, ends = packed([prompt(4), prompt(7)]) if documents else (prompt(2, 9), None)
    model.checkpoint_loops = not documents
    target = targets(tokens)
    got = model(tokens, target, ends)
    got.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    measured = model.loop_metrics
    model.zero_grad()

    loss, own, losses, exits = plain(model, tokens, target, ends)
    (loss + (torch.stack(own).mean() if own else 0)).backward()
    n_loops = model.n_loops
    torch.testing.assert_close(got, losses[-1])
    torch.testing.assert_close(measured["loss/objective"], loss)
    for prefix, values in (("loss/loop", losses), ("loops/exit", exits)):
        keys = [key for key in measured if key.startswith(f"{prefix}/")]
        assert keys == [f"{prefix}/{t}" for t in range(n_loops if values else 0)]
        for key, value in zip(keys, values, strict=True):
            torch.testing.assert_close(measured[key], value.detach())
    for name, p in model.named_parameters():
        want = p.grad
        if want is None or grads[name] is None:  # p_T = 1 has no gradient with one loop
            assert grads[name] is None and (want is None or not want.any()), name
        else:
            torch.testing.assert_close(grads[name], want, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("loop_loss", LOSSES, ids=str)
def test_a_loss_on_some_tokens_has_the_mean_of_the_loss_on_all(loop_loss):
    def run(every: int) -> tuple[float, dict[str, Tensor]]:
        model = make(loop_count=T, loop_loss=loop_loss, loop_loss_every=every)
        tokens, objective = prompt(2, 9), 0.0
        for step in range(every):
            model.begin_step(step, every)
            (model(tokens, targets(tokens)) / every).backward()
            objective += model.loop_metrics["loss/objective"].item() / every
        return objective, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (some, grads), (all_tokens, wanted) = run(4), run(1)
    assert some == pytest.approx(all_tokens)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-6)


def test_an_exit_distribution_sums_to_1_at_any_logit():
    logits = [torch.tensor([0.0, 300.0, -300.0, 2.0]), torch.tensor([0.0, 9.0, 300.0, -2.0])]
    p = log_exit_distribution(logits, like=logits[0]).exp()
    assert p[:, 0].tolist() == [0.5, 0.25, 0.25]
    torch.testing.assert_close(p.sum(0), torch.ones(4))
    assert p[:, 1].tolist() == [1, 0, 0] and p[:, 2].tolist() == [0, 1, 0]


@pytest.mark.parametrize("loop_loss", LOSSES, ids=str)
def test_without_gradients_only_the_last_loop_has_a_loss(loop_loss):
    model, other = (make(loop_count=T, loop_loss=kind) for kind in (loop_loss, "none"))
    other.load_state_dict(model.state_dict(), strict=False)
    tokens = prompt(2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens, targets(tokens)), other(tokens, targets(tokens)))
        assert torch.equal(model(tokens), other(tokens)) and model.loop_metrics == {}
    last = make(loop_count=T, loop_loss=[0, 0, 3])
    last.load_state_dict(other.state_dict())
    for m in (last, other):
        m(tokens, targets(tokens)).backward()
    for (name, p), q in zip(other.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


class Logits(TorchDispatchMode):
    """Count the chunks of logits, and record the largest tensor with an entry for each token."""

    def __init__(self):
        super().__init__()
        self.largest, self.n_chunks = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and VOCAB in out.shape and out.numel() != VOCAB * DIM:
            self.largest = max(self.largest, out.numel())
            self.n_chunks += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("loop_loss", LOSSES, ids=str)
def test_memory_is_one_chunk_of_logits_and_one_gradient_of_the_head(loop_loss, every):
    model = make(loop_count=T, loop_loss=loop_loss, loop_loss_every=every)
    tokens, kept = prompt(4, 9), {}

    def keep(x: Tensor) -> Tensor:
        if VOCAB in x.shape and not isinstance(x, torch.nn.Parameter):
            kept[x.data_ptr()] = x.numel()
        return x

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with Logits() as logits, saved:
        model(tokens, targets(tokens))
    n_chunks = 14 if every == 4 else 27  # 36 + 2 x 9 tokens, or 3 x 36, in chunks of 4
    assert (logits.largest, logits.n_chunks) == (4 * VOCAB, n_chunks)
    assert list(kept.values()) == [VOCAB * DIM]


@pytest.mark.parametrize("loop_loss", LOSSES, ids=str)
def test_the_loss_keeps_its_gradients_and_no_normed_state(loop_loss):
    model, kept = make(loop_count=T, loop_loss=loop_loss, loop_loss_every=4), []
    states = [torch.randn(4, 9, DIM, requires_grad=True) for _ in range(T)]
    known = {x.data_ptr() for x in (*states, *model.parameters())}

    def keep(x: Tensor) -> Tensor:
        if DIM in x.shape and x.data_ptr() not in known:
            kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.loss_of(states[-1], targets(prompt(4, 9)), None, states)
    assert kept == [(9 * (T - 1) + 36, DIM), (VOCAB, DIM)]


@pytest.mark.parametrize("loop_loss", LOSSES, ids=str)
def test_the_norm_runs_on_tokens_with_a_loss(loop_loss):
    model, rows = make(loop_count=T, loop_loss=loop_loss, loop_loss_every=4), []
    model.norm.register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // DIM))
    model(prompt(4, 9), targets(prompt(4, 9)))
    assert rows == [9] * (T - 1) + [36]


@pytest.mark.parametrize("loop_loss", LOSSES, ids=str)
def test_no_loss_syncs_with_the_device(loop_loss):
    model, tokens = make(loop_count=T, loop_loss=loop_loss), prompt(2, 9)
    n_targets = torch.tensor(14.0)
    with no_waiting():
        model(tokens, targets(tokens), None, n_targets).backward()


@pytest.mark.parametrize("loop_loss", ["uniform", "gate"])
def test_parameters_flops_and_memory(loop_loss):
    def meta(loop_loss: Any, loops: int = 4) -> LoopedTransformer:
        changes = {"loop_count": 4, "loop_schedule": f"{loops}@0"}
        args = make(jitter=0, loop_loss=loop_loss, **changes).args
        model = build_on_meta(args)
        model.begin_step(0)
        return model

    model, none, dim = meta(loop_loss), meta("none"), meta("none").args.dim
    every_8 = build_on_meta(replace(model.args, loop_loss_every=8))
    n_gate = dim + 1 if loop_loss == "gate" else 0
    assert count_parameters(model).gates - count_parameters(none).gates == n_gate
    assert count_parameters(model).total - count_parameters(none).total == n_gate
    for loops in (1, 2, 4):
        more = step_flops_per_token(model, 16, loops) - step_flops_per_token(none, 16, loops)
        exits = 2 * dim if loop_loss == "gate" else 0
        assert more == 3 * (loops - 1) * (head_flops(model) + exits)
        more = step_flops_per_token(every_8, 16, loops) - step_flops_per_token(none, 16, loops)
        assert more == 3 * (loops - 1) * (head_flops(model) // 8 + exits)
    args = DistributedArgs(model_dtype="bf16")
    kept = {
        name: training_memory(m, args, batch_size=2, seqlen=16).kept["none"]
        for name, m in {"some": model, "none": none, "every 8": every_8}.items()
    }
    assert kept["some"] - kept["none"] == 3 * 2 * 32 * dim > 0
    assert kept["every 8"] - kept["none"] == 3 * 2 * 4 * dim
    # With a large vocabulary the peak is at the loss, where the normed states wait too.
    peaks = [
        training_memory(
            build_on_meta(replace(model.args, vocab_size=10**5, loop_loss_every=every)),
            args,
            batch_size=2,
            seqlen=16,
        ).peak["none"]
        for every in (1, 8)
    ]
    assert peaks[0] - peaks[1] == 2 * 3 * 2 * (32 - 4) * dim


@pytest.mark.parametrize(
    "loop_loss",
    ["mean", "", None, True, 3, [], [1, 2], [1, 2, 3, 4, 5], [1, 1, 1, -1], [0, 0, 0, 0]]
    + [[1, 1, 1, float("inf")], [1, 1, 1, True], [1, 1, 1, "2"], ["none"]],
    ids=str,
)
def test_mistakes_name_the_option_and_its_value(loop_loss):
    with pytest.raises(UserError, match=r"^model\.loop_loss=") as error:
        make(loop_count=4, loop_loss=loop_loss)
    value = "null" if loop_loss is None else str(loop_loss)
    assert value in str(error.value) and "\n" not in str(error.value)


def test_inference_runs_any_number_of_loops_and_keeps_the_gate():
    args = make(loop_count=4, loop_loss="gate").args
    assert build_on_meta(args.with_loops(1)).exit_gate is not None
    assert make(loop_count=4, loop_loss=[1, 2, 3, 4]).args.with_loops(5).loop_loss == "none"


def test_other_mistakes():
    with pytest.raises(UserError, match=r"^model\.loop_entropy=-1"):
        make(loop_count=4, loop_loss="gate", loop_entropy=-1)
    with pytest.raises(UserError, match=r"^model\.loop_loss_every=0"):
        make(loop_count=4, loop_loss="gate", loop_loss_every=0)
    with pytest.raises(UserError, match=r"^model\.loop_loss=.*2 loops"):
        make(loop_count=4, loop_loss=[0, 0, 1, 1], loop_schedule="2@0, 4@0.5")
    with pytest.raises(UserError, match=r"^model\.loop_loss=gate with model\.loop_count=1"):
        check_exits("gate", 1)
