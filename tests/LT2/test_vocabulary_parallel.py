"""A vocabulary split over ranks gives the loss, logits, gradients and weights of one process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.LT2.flops import count_parameters
from apps.LT2.kernel import linear_cross_entropy as door
from apps.LT2.kernel.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy
from apps.LT2.parallel import build_fsdp_grouping_plan, tp_parallelize
from apps.LT2.transformer import LoopedTransformer
from lingua.checkpoint import CheckpointArgs, CheckpointManager
from lingua.checkpointing.weights import consolidate_checkpoints, find_weights, read_weights
from lingua.distributed import (
    check_model_value_range,
    get_device_mesh,
    parallelize_model,
    sync_replicated_grads,
)
from lingua.parallel.args import DistributedArgs
from lingua.parallel.tensor_parallel import TensorParallel
from tests.lingua.dist_utils import OpCounter, run_ranks
from tests.lingua.toy import whole
from tests.LT2.tiny import AtStep, tiny_args, tiny_model
from tests.tolerances import BF16_KERNEL, FP32, FP32_MODEL, differences

WORLD = 4
MESHES = {
    size: DistributedArgs(
        model_dtype="fp32", fsdp_type="full_shard", tp_size=size, dp_replicate=WORLD // size
    )
    for size in (2, 4)
}

OUTSIDE = (-1, 260, 261, 10**6)  # tokens outside of a vocabulary of 260

# ---- the loss

N, D, V, CHUNK = 21, 16, 52, 8
N_CHUNKS = -(-N // CHUNK)
# (options of `loss_inputs`, whether the weight is frozen)
LOSSES: dict[str, tuple[dict[str, Any], bool]] = {
    "all targets": ({}, False),
    "a chunk without targets": ({"ignored": range(CHUNK, 2 * CHUNK)}, False),
    "no target": ({"ignored": range(N)}, False),
    "large logits": ({"scale": 1e3}, False),
    "bf16": ({"dtype": torch.bfloat16}, False),
    "frozen weight": ({}, True),
}


def loss_inputs(ignored=(), scale: float = 1.0, dtype=torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    target = torch.randint(V, (N,), generator=generator)
    target[list(ignored)] = -100
    return hidden.to(dtype), weight.to(dtype), target


def differing_loss(tp: TensorParallel, options: dict, frozen: bool) -> str:
    hidden, weight, target = loss_inputs(**options)
    mine = hidden.clone().requires_grad_(), tp.own(weight).clone().requires_grad_(not frozen)
    exact = hidden.float().requires_grad_(), weight.float().requires_grad_(not frozen)
    loss = linear_cross_entropy(mine[0], mine[1], target, tp=tp)
    want = naive_linear_cross_entropy(exact[0], exact[1], target)
    wrong = differences({"loss": loss}, {"loss": want}, FP32)
    # A factor on the loss, as in gradient accumulation.
    got = torch.autograd.grad(3 * loss, mine[: 1 if frozen else 2])
    d_hidden, *d_weight = torch.autograd.grad(3 * want, exact[: 1 if frozen else 2])
    wants = [d_hidden, *map(tp.own, d_weight)]
    assert all(grad.dtype == hidden.dtype for grad in got)
    bound = FP32 if hidden.dtype == torch.float32 else BF16_KERNEL
    names = ("hidden", "weight")
    return wrong + differences(
        dict(zip(names, got, strict=False)), dict(zip(names, wants, strict=False)), bound
    )


def collectives_of_loss(tp: TensorParallel) -> dict[str, dict[str, int]]:
    hidden, weight, target = loss_inputs()
    own = tp.own(weight).clone().requires_grad_()
    with OpCounter() as training:
        linear_cross_entropy(hidden.requires_grad_(), own, target, tp=tp).backward()
    with torch.no_grad(), OpCounter() as evaluation:
        linear_cross_entropy(hidden, own, target, tp=tp)
    return {
        name: {op: counter.counts[op] for op in ("all_reduce", "all_gather", "mm", "addmm")}
        for name, counter in (("training", training), ("evaluation", evaluation))
    }


# ---- the model


def parallel(model: LoopedTransformer, args: DistributedArgs) -> tuple[LoopedTransformer, Any]:
    mesh, plan = get_device_mesh(args), build_fsdp_grouping_plan(model.args)
    parallelize_model(model, mesh, model.args, args, plan, tp_parallelize)
    return model, mesh


def logits_and_gradients(model: LoopedTransformer, mesh: Any) -> dict[str, Tensor]:
    tokens = torch.arange(0, 260, 13).view(2, 10)
    logits = model(tokens)
    logits.square().mean().backward()
    sync_replicated_grads(model, mesh)
    seen = {f"{n}.grad": whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    target = tokens.roll(-1, 1)
    target[:, -1] = -100
    with torch.no_grad():
        return seen | {"logits": logits, "evaluation": model(tokens, target)}


def differing_model(args: DistributedArgs, tied: bool) -> str:
    options = {"n_heads": 4, "n_layers": 1, "vocab_size": 260, "weight_tying": tied}
    single, split = (tiny_model("full", 2, **options).requires_grad_(True) for _ in range(2))
    model, mesh = parallel(split, args)
    got, want = logits_and_gradients(model, mesh), logits_and_gradients(single, None)
    return differences(got, want, FP32_MODEL)


def new_model(vocab_size: int, args: DistributedArgs | None = None) -> tuple[Any, Any]:
    """Split or shard a model, then initialize it."""
    with torch.device("meta"):
        model = LoopedTransformer(tiny_args("full", 1, n_heads=4, vocab_size=vocab_size))
    model, mesh = parallel(model, args) if args is not None else (model, None)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p.detach(), float("nan"))
    torch.manual_seed(3)
    model.init_weights()
    return model, mesh


def describe_new_model(vocab_size: int, args: DistributedArgs, folder: Path) -> dict[str, Any]:
    (model, mesh), (single, _) = new_model(vocab_size, args), new_model(vocab_size)
    want = {name: p.detach() for name, p in single.named_parameters()}
    manager = CheckpointManager.instantiate_and_make_dir(CheckpointArgs(path=str(folder)))
    manager.save(model, None, AtStep(1), {}, mesh)
    return {
        "differ": [n for n, p in model.named_parameters() if not torch.equal(whole(p), want[n])],
        "same count": count_parameters(model) == count_parameters(single),
        "suspicious": check_model_value_range(model, range=20, std=5, zero_init=["rho"]),
        "rows": [m.weight.to_local().shape[0] for m in (model.tok_embeddings, model.output)],
        "weights": want,
    }


def errors_of_tokens_outside(args: DistributedArgs | None) -> list[str]:
    model = tiny_model("full", 1, n_heads=4, vocab_size=260)
    if args is not None:
        model, _ = parallel(model, args)
    wrong = []
    for token in OUTSIDE:
        try:
            model(torch.tensor([[1, token]]))
        except IndexError as error:
            wrong.append(str(error))
    return wrong


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.getMessage()}")


def messages_for_vocabulary(args: DistributedArgs, vocab_size: int) -> list[str]:
    messages = Messages()
    logging.getLogger().addHandler(messages)
    parallel(tiny_model("full", 1, n_heads=4, vocab_size=vocab_size), args)
    logging.getLogger().removeHandler(messages)
    return messages.messages


def look(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for size, args in MESHES.items():
        for tied in (False, True):
            seen[f"model {size} {tied}"] = differing_model(args, tied)
        seen[f"new {size}"] = describe_new_model(260 + size, args, folder / f"new {size}")
        seen[f"outside {size}"] = errors_of_tokens_outside(args)
    seen["messages"] = [messages_for_vocabulary(MESHES[4], v) for v in (260, 258)]
    door.CHUNK_TOKENS = CHUNK
    for size, args in MESHES.items():
        mesh = get_device_mesh(args)
        assert mesh is not None
        tp = TensorParallel(mesh["tp"])
        for case, (options, frozen) in LOSSES.items():
            seen[f"loss {size} {case}"] = differing_loss(tp, options, frozen)
        seen[f"collectives {size}"] = collectives_of_loss(tp)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(WORLD, look, folder)


@pytest.mark.parametrize("size", MESHES)
@pytest.mark.parametrize("case", LOSSES)
def test_loss_equals_one_process(ranks, size, case):
    wrong = [seen[f"loss {size} {case}"] for seen in ranks]
    assert not any(wrong), max(wrong)


@pytest.mark.parametrize("size", MESHES)
def test_loss_communicates_two_numbers_per_token_and_one_gradient(ranks, size):
    shared = {"all_reduce": 0, "all_gather": N_CHUNKS, "mm": N_CHUNKS, "addmm": 0}
    for seen in ranks:
        assert seen[f"collectives {size}"] == {
            "training": shared | {"all_reduce": 1, "mm": 2 * N_CHUNKS, "addmm": N_CHUNKS},
            "evaluation": shared,
        }


@pytest.mark.parametrize("size", MESHES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_their_gradients_equal_one_process(ranks, size, tied):
    wrong = [seen[f"model {size} {tied}"] for seen in ranks]
    assert not any(wrong), max(wrong)


@pytest.mark.parametrize("size", MESHES)
def test_a_token_outside_the_vocabulary_fails_as_in_one_process(ranks, size):
    want = errors_of_tokens_outside(None)
    assert len(want) == len(OUTSIDE)
    assert [seen[f"outside {size}"] for seen in ranks] == [want] * WORLD


@pytest.mark.parametrize("size", MESHES)
def test_a_new_model_equals_one_process(ranks, folder, size):
    rows = []
    for seen in ranks:
        new = seen[f"new {size}"]
        assert new["differ"] == [] and new["same count"] and new["suspicious"] == []
        rows.append(new["rows"])
    # Two data-parallel ranks split 131 rows unevenly.
    want = {2: [66, 66, 65, 65], 4: [66] * 4}[size]
    assert rows == [[n, n] for n in want]


@pytest.mark.parametrize("size", MESHES)
def test_exported_weights_are_whole(ranks, folder, size):
    (step,) = (path for path in (folder / f"new {size}").iterdir() if path.is_dir())
    file = find_weights(consolidate_checkpoints(step))
    assert file is not None
    got, want = read_weights(file, "file"), ranks[0][f"new {size}"]["weights"]
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_a_vocabulary_that_does_not_divide_is_warned_about_once(ranks):
    (divided, left_whole), *others = [seen["messages"] for seen in ranks]
    assert divided == [] and others == [[[], []]] * (WORLD - 1)
    (message,) = left_whole
    assert message.startswith("WARNING distributed.tp_size=4")
    assert "model.vocab_size=260" in message
