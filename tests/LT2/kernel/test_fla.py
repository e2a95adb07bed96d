"""The operators on fla's kernels, without fla: gradients, arguments, and tables of documents."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from apps.LT2.kernel import fla
from apps.LT2.kernel.documents import upload_cu_seqlens
from apps.LT2.kernel.fla import (
    ChunkOperator,
    chunk_offsets,
    import_with_16_bit_gradients,
    packed_arguments,
)
from apps.LT2.kernel.gated_delta_rule import backward
from apps.LT2.kernel.simple_gla import fla as simple_gla
from tests.tolerances import FP32, assert_same
from tests.waiting import no_waiting

SCALE = 0.5


def toy(q, k, v, g, state):
    """o (B, T, H, K) and the final state (B, H, K, K)."""
    final = torch.einsum("bthk,bthv->bhkv", k, v)
    return SCALE * q * k * v * g.exp()[..., None], final if state is None else final + 3 * state


def toy_forward(q, k, v, g, packed, *, scale, initial_state, **options):
    assert scale == SCALE and options == {"output_final_state": True, "chunk_size": 64}
    return *toy(q, k, v, g, initial_state), g.exp(), q * k


def toy_backward(q, k, v, decay, qk, packed, *, scale, initial_state, do, dht, chunk_size):
    do = scale * do * decay[..., None]
    dht = torch.zeros(q.shape[0], q.shape[2], *[q.shape[3]] * 2) if dht is None else dht
    dk = do * q * v + torch.einsum("bhkv,bthv->bthk", dht, v)
    dv = do * qk + torch.einsum("bhkv,bthk->bthv", dht, k)
    dg = None if decay.ndim == 1 else (do * qk * v).sum(-1)
    return do * k * v, dk, dv, dg, None if initial_state is None else 3 * dht


TOY = ChunkOperator("test_toy", ("g",), toy_forward, toy_backward, n_matrices=1, section="model")


def toy_inputs(K: int, *, constant_decay=False, with_state=True) -> list[Tensor | None]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3, K).requires_grad_() for _ in range(3))
    g = torch.randn(3) if constant_decay else torch.randn(2, 5, 3).requires_grad_()
    return [q, k, v, g, torch.randn(2, 3, K, K).requires_grad_() if with_state else None]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(fla, "check_fla_inputs", lambda *_: None)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("constant_decay", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("read", ["o", "final", "both"])
def test_gradients_reach_every_input(read, with_state, constant_decay):
    """The head dim is padded to 64 for the kernels."""
    *inputs, state = toy_inputs(4, constant_decay=constant_decay, with_state=with_state)
    leaves = [x for x in (*inputs, state) if x is not None and x.requires_grad]

    def gradients(o, final):
        loss = torch.zeros(())
        if read != "final":
            loss = loss + o.sin().sum()
        if read != "o":
            loss = loss + final.cos().sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    got, want = TOY.run(*inputs, scale=SCALE, state=state), toy(*inputs, state)
    for a, b in zip((*got, *gradients(*got)), (*want, *gradients(*want)), strict=True):
        assert_same(a, b, FP32)


@pytest.mark.parametrize("constant_decay", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_operator_is_registered_well(with_state, constant_decay):
    """Check schema, fake shapes, autograd and dynamic shapes with torch's own check."""
    inputs = toy_inputs(64, constant_decay=constant_decay, with_state=with_state)
    torch.library.opcheck(TOY.forward, (*inputs, None, SCALE))
    with torch.no_grad():
        o, final, *kept = TOY.forward(*inputs, None, SCALE)
    q, k, v, _, state = (None if x is None else x.detach() for x in inputs)
    for dfinal in (final, None):
        saved = (q, k, v, *kept, state, None, SCALE, o, dfinal)
        torch.library.opcheck(TOY.backward, saved, test_utils=("test_schema", "test_faketensor"))


# What fla 0.6.0 returns, in order, and the arguments of its backward that forward keeps.
FORWARD = {
    "gated_delta_rule": "g_sum o solved final _ _",
    "kda": "o final g_sum scores solved _ _ _ _ _ _",
    "delta_rule": "o solved final",
    "gla": "g_sum scores _ final o",
}
BACKWARD = {
    "gated_delta_rule": "dq dk dv dbeta dg dstate _ _",
    "kda": "dq dk dv dbeta dg dstate _ _",
    "delta_rule": "dq dk dv dbeta dstate",
    "gla": "dq dk dv dg dstate",
}
KEPT = {
    "gated_delta_rule": {"g": "g_sum", "A": "solved"},
    "kda": {"g": "g_sum", "Aqk": "scores", "Akk": "solved"},
    "delta_rule": {"A": "solved"},
    "gla": {"g_cumsum": "g_sum", "A": "scores"},
}
# Module, launcher and kernel of dq and dk.
PATCHED = {
    "kda": ("fla.ops.kda.chunk_bwd", "chunk_kda_bwd_intra", "chunk_kda_bwd_kernel_intra"),
    "gla": ("fla.ops.gla.chunk", "chunk_gla_bwd_dqkg", "chunk_gla_bwd_kernel_inter"),
}
NAMES = sorted(set(" ".join([*FORWARD.values(), *BACKWARD.values()]).split()))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("packed", [False, True])
def test_every_tensor_of_fla_goes_to_its_place(monkeypatch, name, packed):
    """Stand-ins for fla's kernels return tensors whose elements say which one it is."""
    B, T, H, K = 1, 70, 2, 64
    per_head, per_channel, state_shape = (B, T, H), (B, T, H, K), (1, H, K, K)
    shapes = {"g": per_channel if name in ("gla", "kda") else per_head, "beta": per_head}
    shapes |= {"g_sum": shapes["g"], "final": state_shape, "state": state_shape}
    rest = [x for x in ("g", "beta") if f"d{x}" in BACKWARD[name].split()]
    bf16 = {"o", "dq", "dk", "dv", "solved"} | ({"scores"} if name == "kda" else set())
    calls = {}

    def tensor(x: str) -> Tensor | None:
        shape = shapes.get(x.removeprefix("d"), per_channel)
        dtype = torch.bfloat16 if x in bf16 else torch.float32
        return None if x == "_" else torch.full(shape, NAMES.index(x), dtype=dtype)

    def stand_in(direction: str, returns: str):
        def call(**arguments):
            calls[direction] = arguments
            return tuple(tensor(x) for x in returns.split())

        return call

    kernels = SimpleNamespace(chunk_local_cumsum=lambda g, **_: tensor("g_sum"))
    setattr(kernels, f"chunk_{name}_fwd", stand_in("forward", FORWARD[name]))
    setattr(kernels, f"chunk_{name}_bwd", stand_in("backward", BACKWARD[name]))
    module = importlib.import_module(f"apps.LT2.kernel.{name}.fla")
    for user in (fla, module):
        monkeypatch.setattr(user, "import_fla", lambda _: kernels)
    if name in PATCHED:

        def patched(*names: str) -> SimpleNamespace:
            assert names == PATCHED[name]
            return kernels

        monkeypatch.setattr(module, "import_with_16_bit_gradients", patched)

    q, k, v = (torch.randn(per_channel).bfloat16().requires_grad_() for _ in range(3))
    inputs = [q, k, v, *(torch.randn(shapes[x]).requires_grad_() for x in rest)]
    state = torch.randn(state_shape).requires_grad_()
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    o, final = module.OPERATOR.run(*inputs, state=state, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(o.sum() + final.sum(), (*inputs, state))

    got = dict(zip((f"d{x}" for x in ("q", "k", "v", *rest, "state")), grads, strict=True))
    got |= {"o": o, "final": final}
    want = {x: x for x in got}
    got |= {x: calls["backward"][x] for x in KEPT[name]}
    want |= KEPT[name]
    for x, source in want.items():
        assert (got[x] == NAMES.index(source)).all(), x
    for arguments in calls.values():
        assert arguments["initial_state"].equal(state) and arguments["scale"] == K**-0.5
        assert ("chunk_indices" in arguments) == ("cu_seqlens" in arguments) == packed


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_only_kernels_of_states_read_repeated_queries_and_keys(monkeypatch, packed, constant):
    """Stand-ins for the five kernels of simple_gla return a number each."""
    T, groups, heads, K = 70, 2, 4, 64
    q, k = (torch.randn(1, T, groups, K).bfloat16().requires_grad_() for _ in range(2))
    v = torch.randn(1, T, heads, K).bfloat16().requires_grad_()
    g = torch.randn(heads) if constant else torch.randn(1, T, heads).requires_grad_()
    state = torch.randn(1, heads, K, K).requires_grad_()
    states, calls = torch.zeros(1, 2, heads, K, K), {}

    def stand_in(kernel: str, *returns: tuple[Tensor, float] | None):
        def call(*_, **arguments):
            calls.setdefault(kernel, []).append(arguments)
            tensors = [None if x is None else torch.full_like(*x) for x in returns]
            return tensors if len(tensors) > 1 else tensors[0]

        return call

    kernels = SimpleNamespace(
        chunk_local_cumsum=stand_in("sum", (g, 1)),
        chunk_fwd_h=stand_in("h", (states, 2), (state, 3)),
        chunk_fwd_o=stand_in("o", (v, 4)),
        chunk_bwd_dh=stand_in("dh", (states, 5), (state, 6)),
        chunk_bwd_dqkwg=stand_in("dqk", (q, 7), (k, 8), None, None if constant else (g, 9)),
        chunk_bwd_dv=stand_in("dv", (v, 10)),
    )
    for user in (fla, simple_gla):
        monkeypatch.setattr(user, "import_fla", lambda _: kernels)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    o, final = simple_gla.OPERATOR.run(q, k, v, g, state=state, cu_seqlens=cu_seqlens)
    leaves = [x for x in (q, k, v, g, state) if x.requires_grad]
    grads = torch.autograd.grad(2 * o.sum() + 5 * final.sum(), leaves)

    # The gradient of a sum is summed again.
    numbers = [4, 3, 7, 8, 10, *([] if constant else [1]), 6]
    assert [x.unique().item() for x in (o, final, *grads)] == numbers
    wide_q, wide_k = (x.repeat_interleave(heads // groups, dim=2) for x in (q, k))
    (forward, again), (output,), (dstates,), (dqk,), (dv,) = (
        calls[kernel] for kernel in ("h", "o", "dh", "dqk", "dv")
    )
    for arguments in (forward, again):
        assert arguments["k"].equal(wide_k) and arguments["h0"].equal(state)
    assert forward["output_final_state"] and again["states_in_fp32"]
    assert dstates["q"].equal(wide_q) and dstates["h0"].equal(state)
    assert dstates["states_in_fp32"] and (dstates["dht"] == 5).all()
    for arguments in (dstates, dqk, dv):
        assert (arguments["do"] == 2).all() and arguments["do"].shape == v.shape
    for arguments in (output, dstates, dqk, dv):
        assert arguments["scale"] == K**-0.5
    for arguments in (output, dqk, dv):
        assert arguments["q"].equal(q) and arguments["k"].equal(k)
        assert ("chunk_indices" in arguments) == packed
    assert output["h"].unique() == dqk["h"].unique() == 2
    assert dqk["dh"].unique() == dv["dh"].unique() == 5
    for arguments in (forward, again, output, dstates, dqk, dv):
        decays, none = arguments["g"], arguments["g_gamma"]
        if constant:
            decays, none = none, decays
        assert none is None and arguments["chunk_size"] == 64
        assert decays.equal(g / math.log(2)) if constant else (decays == 1).all()
        assert (arguments.get("cu_seqlens") is not None) == packed


# Like fla, it wraps its launchers, whose gradients dq2 and dk2 are fp32.
TOY_OF_FLA = """
import torch

class kernel:
    def __class_getitem__(cls, grid):
        return cls.run

    def run(q, dq, dk, db, dq2, dk2):
        if q.isnan().any():
            raise ArithmeticError
        dq2.copy_(dq), dk2.copy_(dk), db.copy_(q + 1.0)

@wrapped
def launch(q, dq, dk):
    db = torch.empty_like(q, dtype=torch.float)
    dq2, dk2 = torch.empty_like(dq), torch.empty_like(dk)
    if not q.isinf().any():
        kernel[1](q=q, dq=dq, dk=dk, db=db, dq2=dq2, dk2=dk2)
    return dq2, dk2, db

def backward(q, k):
    n_value_heads = 2
    dq, dk = (x.float().repeat(n_value_heads) for x in (2 * q, 3 * k))
    return launch(q=q, dq=dq, dk=dk)
"""


def test_the_last_kernel_of_kda_writes_16_bits(monkeypatch):
    def wrapped(launch):
        return functools.wraps(launch)(lambda **arguments: launch(**arguments))

    module = ModuleType("toy")
    names = vars(module)
    names["wrapped"] = wrapped  # a function of another module
    exec(TOY_OF_FLA, names)
    plain = names["kernel"]
    monkeypatch.setattr(fla, "import_fla", lambda _: module)
    q, k = torch.randn(3).bfloat16(), torch.randn(3).bfloat16()
    fla._write_16_bit_gradients.cache_clear()
    backward = import_with_16_bit_gradients("toy", "launch", "kernel").backward
    fla._write_16_bit_gradients.cache_clear()
    with pytest.raises(ArithmeticError):
        backward(q * torch.nan, k)
    with pytest.raises(AssertionError, match="launch of toy does not launch kernel"):
        backward(q * torch.inf, k)
    for _ in range(2):
        dq, dk, db = backward(q, k)
        assert dq.equal((2 * q).repeat(2)) and dk.equal((3 * k).repeat(2))
        assert dq.dtype == dk.dtype == q.dtype
        assert db.equal((q + 1).float()) and names["kernel"] is plain


@pytest.mark.parametrize("name", ["gated_delta_rule", "delta_rule"])
def test_our_backward_gets_and_returns_every_tensor(monkeypatch, name):
    """Stand-ins for fla's kernels and for ours return what their arguments say."""
    module = importlib.import_module(f"apps.LT2.kernel.{name}.fla")
    calls = {}

    def stand_in(kernel: str, returns: str):
        def call(*arguments, **named):
            calls[kernel] = [*arguments, named]
            return tuple(returns.split()) if " " in returns else returns

        return call

    kernels = SimpleNamespace(
        recompute_w_u_fwd=stand_in("wy", "w u_v"),
        chunk_gated_delta_rule_fwd_h=stand_in("h", "h u _"),
        chunk_bwd_dv_local=stand_in("local", "du_local"),
        chunk_gated_delta_rule_bwd_dhu=stand_in("dh", "dh dstate du"),
    )
    monkeypatch.setattr(backward, "import_fla", lambda _: kernels)
    monkeypatch.setattr(backward, "input_gradients", stand_in("ours", "dq dk dv dg dbeta"))
    monkeypatch.setattr(module, "kernel_supports", lambda *_: True)

    decays = name == "gated_delta_rule"
    options = {"scale": 2, "initial_state": "state", "do": "do", "dht": "dht", "chunk_size": 64}
    packed = {"cu_seqlens": "offsets", "chunk_indices": "indices"}
    saved = ["q", "k", "v", *(["g"] if decays else []), "beta", "solved"]
    got = module._backward(*saved, packed, **options)
    assert got == ("dq", "dk", "dv", *(["dg"] if decays else []), "dbeta", "dstate")

    g = "g" if decays else None
    chunks = {"g": g, "chunk_size": 64, **packed}
    assert calls == {
        "wy": [{"k": "k", "v": "v", "beta": "beta", "A": "solved", "g": g, **packed}],
        "h": [
            {"k": "k", "w": "w", "u": "u_v", "initial_state": "state", **chunks}
            | {"output_final_state": False}
        ],
        "local": [{"q": "q", "k": "k", "do": "do", "scale": 2, **chunks}],
        "dh": [
            {"q": "q", "k": "k", "w": "w", "h0": "state", "dht": "dht", "do": "do"}
            | {"dv": "du_local", "scale": 2, **chunks}
        ],
        "ours": [
            *("q", "k", "v", g, "beta", "solved", "u", "h", "do", "dh", "du"),
            {"scale": 2, **packed},
        ],
    }


@pytest.mark.parametrize(
    "capability, K, V, supported",
    [
        ((9, 0), 96, 192, True),
        ((9, 0), 128, 256, True),
        ((9, 0), 80, 192, False),
        ((9, 0), 96, 144, False),
        ((9, 0), 96, 512, False),
        ((8, 0), 96, 192, False),
    ],
)
def test_our_backward_runs_where_it_fits(monkeypatch, caplog, capability, K, V, supported):
    backward._supports.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert backward._supports(torch.device("cuda"), K, V) == supported
    assert len(caplog.records) == (not supported)
    backward._supports.cache_clear()


# ---- tables of packed documents


def test_chunks_are_numbered_by_document():
    packed = packed_arguments(upload_cu_seqlens([0, 64, 64, 129, 130], "cpu"))
    assert packed["cu_seqlens"].tolist() == [0, 64, 64, 129, 130]
    # An empty document has a number but no chunk.
    assert packed["chunk_indices"].tolist() == [[0, 0], [2, 0], [2, 1], [3, 0]]
    assert {x.dtype for x in packed.values()} == {torch.int32}
    assert packed_arguments(None) == {}


def test_the_host_knows_the_number_of_chunks():
    cu_seqlens = upload_cu_seqlens([0, 64, 64, 129, 130], "cpu")
    with no_waiting():
        offsets = chunk_offsets(cu_seqlens, 64)
        assert offsets[-1].item() == 4
        assert chunk_offsets(cu_seqlens, 64) is offsets
    assert offsets.dtype == torch.int64 and offsets.data_ptr()
    assert offsets.tolist() == [0, 1, 1, 3, 4]
    assert chunk_offsets(cu_seqlens, 16).tolist() == [0, 4, 4, 9, 10]
    cu_seqlens.copy_(torch.tensor([0, 64, 65, 129, 130]))
    assert chunk_offsets(cu_seqlens, 64).tolist() == [0, 1, 2, 3, 4]


def test_tables_are_shared_until_cu_seqlens_changes():
    """fla caches its tables by the identity of cu_seqlens."""
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    first = packed_arguments(cu_seqlens)
    assert all(first[name] is x for name, x in packed_arguments(cu_seqlens).items())
    cu_seqlens.copy_(torch.tensor([0, 1, 5]))
    second = packed_arguments(cu_seqlens)["cu_seqlens"]
    assert second.tolist() == [0, 1, 5] and first["cu_seqlens"].tolist() == [0, 2, 5]


def test_tables_of_uploaded_cu_seqlens_need_no_sync():
    cu_seqlens = upload_cu_seqlens([0, 2, 5], "cpu")
    with no_waiting():
        packed_arguments(cu_seqlens)


# ---- the import


def test_a_package_runs_its_init_only_when_asked_for_a_name(tmp_path, monkeypatch):
    """fla's own imports every layer and model."""
    ops = tmp_path / "toy_fla" / "ops"
    ops.mkdir(parents=True)
    ops.parent.joinpath("__init__.py").write_text("from toy_fla.ops import NAME\n")
    ops.joinpath("__init__.py").write_text("from toy_fla.ops.kernel import KERNEL\nNAME = KERNEL\n")
    ops.joinpath("kernel.py").write_text("from toy_fla import __version__\nKERNEL = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fla, "version", lambda package: "1.0")
    names = ("toy_fla", "toy_fla.ops")
    try:
        for name in names:
            fla._delay_package(name)
        kernel = importlib.import_module("toy_fla.ops.kernel")
        package = importlib.import_module("toy_fla")
        assert "NAME" not in vars(package) and "NAME" not in vars(package.ops)
        assert not hasattr(package, "__wrapped__") and "NAME" not in vars(package)
        assert package.NAME is package.ops.NAME is kernel.KERNEL
        assert package.ops.kernel is kernel
    finally:
        fla._delay_package.cache_clear()
        for name in (*names, "toy_fla.ops.kernel"):
            sys.modules.pop(name, None)


def test_a_missing_package_is_an_import_error():
    with pytest.raises(ImportError):
        fla._delay_package("no_such_package")
