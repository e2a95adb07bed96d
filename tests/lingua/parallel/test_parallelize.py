"""Activation checkpointing, compilation and value checks of a model in one process."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from lingua import distributed as ld
from lingua.errors import UserError
from lingua.parallel import parallelize
from tests.lingua.dist_utils import OpCounter
from tests.lingua.toy import DIM, LAYERS, LOOPS, PLAN, TOLERANCE, make_batches, make_model, train


@pytest.mark.parametrize("mode", ["none", "selective", "full", "loop"])
def test_what_the_backward_recomputes(mode):
    """Selective saves matmuls but not tanh; full saves neither; the app implements loop."""
    model = make_model()
    ld.parallelize_model(model, None, None, args_of(mode), PLAN)
    tokens, target = make_batches(1, 1)[0, 0]
    with OpCounter() as ops:
        loss = model(tokens, target)
        forward = ops.counts.copy()
        loss.backward()
    again = {name: ops.counts[name] - forward[name] for name in ("tanh", "addmm")}
    calls = LAYERS * LOOPS
    assert forward["tanh"] == forward["addmm"] == calls
    assert (
        again
        == {
            "none": {"tanh": 0, "addmm": 0},
            "loop": {"tanh": 0, "addmm": 0},
            "selective": {"tanh": calls, "addmm": 0},
            "full": {"tanh": calls, "addmm": calls},
        }[mode]
    )


def args_of(mode: str) -> ld.DistributedArgs:
    return ld.DistributedArgs(activation_checkpointing=mode, model_dtype="fp32")


def test_ops_of_the_app_are_saved_with_the_defaults():
    policy = ld.get_default_policy({torch.ops.aten.tanh.default})
    keep = CheckpointPolicy.MUST_SAVE
    assert policy(None, torch.ops.aten.tanh.default) is keep
    assert policy(None, torch.ops.aten.mm.default) is keep
    assert policy(None, torch.ops.aten.exp.default) is not keep


@pytest.mark.usefixtures("fresh_dynamo")
def test_torch_can_cache_a_block_with_a_selective_policy():
    """torch's cache of traced blocks needs a hash, and pickles the policy into its key."""
    model, graphs = make_model(), []
    ld.parallelize_model(model, None, None, args_of("selective"), PLAN)

    def keep_graph(graph, inputs):
        graphs.append(graph)
        return graph.forward

    block = model.layers[0]
    torch.compile(block.forward, backend=keep_graph)(torch.randn(2, 3, DIM, requires_grad=True))
    (context,) = [m.meta[key] for m in graphs[0].modules() if (key := CONTEXT) in m.meta]
    default, other = ld.get_default_policy(), ld.get_default_policy({torch.ops.aten.tanh.default})
    assert context.cache_hash == default.hash != other.hash
    assert pickle.loads(pickle.dumps(default)) == default.hash


CONTEXT = "_checkpoint_context_fn"


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("module", ["apps.toy.kernel.op", "lingua.parallel.toy"])
def test_compiled_code_of_an_older_operator_is_not_used(tmp_path, monkeypatch, module):
    """torch does not see the backward formula of an operator."""
    from torch.compiler import config

    tags, file = [], tmp_path / "op.py"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(__file__=str(file)))
    for text in ("old", "new", "new"):
        file.write_text(text)
        parallelize.operator_code_hash.cache_clear()
        with config.patch(cache_key_tag="mine"):
            for _ in range(2):
                parallelize.compile_blocks([nn.Linear(1, 1)], 8, 1)
            tags.append(config.cache_key_tag)
    parallelize.operator_code_hash.cache_clear()
    assert tags[0] != tags[1] == tags[2]
    assert all(tag.startswith("mine") and len(tag) == len("mine") + 64 for tag in tags)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_blocks_compile_once_for_all_layers_and_loops(monkeypatch, mode):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import in every rank

    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", partial(real, backend=counter, fullgraph=True))
    args = ld.DistributedArgs(model_dtype="fp32", compile=True, activation_checkpointing=mode)
    torch.testing.assert_close(train(None, args), train(None, None), **TOLERANCE)
    assert counter.frame_count == 1


def test_suspicious_values_are_reported():
    model = make_model()
    with torch.no_grad():
        model.rho.zero_()
    assert ld.check_model_value_range(model, zero_init=("rho",)) == []
    with torch.no_grad():
        model.output.weight[3, 2] = float("nan")
        model.layers[0].w1.weight[1, 1] = 5e3
        model.layers[1].w2.weight.zero_()
    problems = ld.check_model_value_range(model, range=1e3)
    assert [problem.split()[0] for problem in problems] == [
        "rho",
        "layers.0.w1.weight",
        "layers.1.w2.weight",
        "output.weight",
    ]
    assert ld.first_nonfinite(model) == "output.weight"


def test_modules_by_path():
    model = make_model()
    new = nn.Linear(1, 1)
    ld.set_module(model, "layers.1.w1", new)
    ld.set_module(model, "output", new)
    assert ld.get_module(model, "layers.1.w1") is new and model.output is new


def test_tensor_parallel_needs_a_plan():
    with pytest.raises(UserError, match="distributed.tp_size=2"):
        ld.parallelize_model(make_model(), None, None, ld.DistributedArgs(tp_size=2), PLAN)
