"""The statistics of a probed step, against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from apps.LT2.batch import Batch
from apps.LT2.kernel.attention.first_token import MAX_QUERIES, first_token_mass
from apps.LT2.kernel.attention.naive import naive_attention, visible_keys
from apps.LT2.kernel.documents import local_positions
from apps.LT2.parallel import build_fsdp_grouping_plan
from apps.LT2.training.probes import run_probed_pass
from apps.LT2.transformer import LoopedTransformer
from lingua.distributed import get_device_mesh, parallelize_model, set_gradient_sync
from lingua.parallel.args import DistributedArgs
from lingua.probe import Probe
from tests.lingua.dist_utils import run_ranks
from tests.LT2.tiny import tiny_model
from tests.tolerances import FP32, FP32_MODEL, assert_same

# A layer has softmax attention never, always, in the first loop or in the last.
PATTERN = "gdn,5,full,gdn->gdn,full,gdn,full"
N_TOKENS = 24
DOCUMENTS = torch.tensor([0, 3, 3, 17, N_TOKENS], dtype=torch.int32)


def make_model(**changes) -> LoopedTransformer:
    options = {"attention_pattern": PATTERN, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
    return tiny_model("gdn", 2, **{**options, **changes}).requires_grad_(True)


def make_batch(n_rows: int, cu_seqlens: torch.Tensor | None = None) -> Batch:
    torch.manual_seed(1)
    x, target = torch.randint(258, (2, n_rows, N_TOKENS)).unbind(0)
    return x, target, cu_seqlens


def measure(model: LoopedTransformer, batch: Batch, mesh=None) -> tuple[dict[str, float], Probe]:
    probe = Probe(model)
    return run_probed_pass(model, probe, batch, mesh), probe


# ---- the first token


def mass_by_definition(q, k, window, cu_seqlens):
    """Compute attention over values that are 1 at the first token of a document, 0 elsewhere."""
    is_first = local_positions(q.shape[1], cu_seqlens, q.device) == 0
    v = is_first.float()[None, :, None, None].expand(*k.shape[:3], 1)
    out = naive_attention(q, k, v, window=window, cu_seqlens=cu_seqlens)  # B T H 1
    return out.squeeze(-1).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("documents", [False, True])
def test_mass_is_the_attention_on_the_first_token(window, documents):
    torch.manual_seed(0)
    cu_seqlens = DOCUMENTS if documents else None
    n_rows = 1 if documents else 2
    q, k = torch.randn(n_rows, N_TOKENS, 4, 8), torch.randn(n_rows, N_TOKENS, 2, 8)
    got = first_token_mass(q, k, window=window, cu_seqlens=cu_seqlens)
    assert_same(got, mass_by_definition(q, k, window, cu_seqlens), FP32)
    out_of_sight = local_positions(N_TOKENS, cu_seqlens, "cpu") >= (window or N_TOKENS)
    assert not got[..., out_of_sight].any()
    assert out_of_sight.any() == (window is not None)


def test_long_rows_are_sampled_evenly():
    torch.manual_seed(0)
    n_tokens = 3 * MAX_QUERIES
    q, k = torch.randn(1, n_tokens, 2, 8), torch.randn(1, n_tokens, 2, 8)
    got = first_token_mass(q, k)
    assert_same(got, mass_by_definition(q, k, None, None)[..., 1::3], FP32)


def test_mask_rows_match_the_whole_mask():
    queries = torch.tensor([0, 4, 16, 17, 23])
    options = {"window": 5, "cu_seqlens": DOCUMENTS, "device": "cpu"}
    whole = visible_keys(N_TOKENS, **options)
    assert torch.equal(visible_keys(N_TOKENS, **options, queries=queries), whole[queries])


# ---- the model


def by_definition(model: LoopedTransformer, batch: Batch) -> dict[str, float]:
    x, target, cu_seqlens = batch
    positions = local_positions(N_TOKENS, cu_seqlens, "cpu")
    want: dict[str, float] = {}

    def rms(tensor):
        return tensor.double().square().mean().sqrt().item()

    h = F.embedding(x, model.tok_embeddings.weight)
    for loop, specs in enumerate(model.layout):
        u, masses = h, []
        for i, (layer, spec) in enumerate(zip(model.layers, specs, strict=True)):
            if spec.mixer in ("full", "window"):
                q, k, _ = layer.attention._qkv(layer.attention_norm(h), positions)
                masses.append(mass_by_definition(q, k, spec.window, cu_seqlens).mean().item())
                want[f"depth/first_token_mass/{loop * len(specs) + i}"] = masses[-1]
            h, _ = layer(h, spec, cu_seqlens)
        if model.rho is not None:
            h = h + model.rho[loop] * u
            want[f"loops/rho/{loop}"] = model.rho[loop].abs().mean().item()
        want[f"loops/residual_rms/{loop}"] = rms(h)
        want[f"loops/residual_growth/{loop}"] = rms(h) / rms(u)
        want[f"loops/update_norm/{loop}"] = rms(h - u) / rms(u)
        if masses:
            want[f"loops/first_token_mass/{loop}"] = sum(masses) / len(masses)
    loss = F.cross_entropy((model.norm(h) @ model.head_weight.T).flatten(0, 1), target.flatten())
    for i, layer in enumerate(model.layers):
        grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        squares = torch.stack([grad.double().square().sum() for grad in grads])
        want[f"layers/grad_norm/{i}"] = squares.sum().sqrt().item()
    return want


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_pattern": None, "use_residual": False}, {"loop_loss": [0, 1]}]
)
def test_statistics_match_their_definition(documents, changes):
    model = make_model(**changes)
    batch = make_batch(1, DOCUMENTS) if documents else make_batch(2)
    want = by_definition(model, batch)
    got, _ = measure(model, batch)
    assert got == pytest.approx(want, rel=FP32_MODEL)
    has_mass = "loops/first_token_mass/1" in got
    assert has_mass == ("loops/rho/1" in got) == ("use_residual" not in changes)


def test_a_task_changes_no_statistic():
    model, batch = make_model(), make_batch(2)
    want, _ = measure(model, batch)
    model.zero_grad()
    model.n_answers = 5  # of the micro-batch before
    assert measure(model, batch)[0] == want


def test_the_probe_records_the_mass_of_each_loop_and_layer():
    model, batch = make_model(), make_batch(2)
    got, probe = measure(model, batch)
    mass = {
        key.removesuffix("::first_token_mass"): stats["mean"]
        for key, stats in probe.results.items()
        if key.endswith("::first_token_mass")
    }
    assert got["depth/first_token_mass/1"] == mass["layers.1.attention[0]"]
    first, last = mass["layers.1.attention[0]"], mass["layers.1.attention[1]"]
    assert got["loops/first_token_mass/0"] == pytest.approx(
        (first + mass["layers.2.attention"]) / 2
    )
    assert got["loops/first_token_mass/1"] == pytest.approx((last + mass["layers.3.attention"]) / 2)
    assert len(mass) == 4


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", ["selective", "full", "loop"])
def test_recomputed_and_compiled_layers_have_the_same_statistics(mode, monkeypatch):
    # Inductor would take long, and the statistics come from the graph that it gets.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    batch = make_batch(1, DOCUMENTS)
    want, _ = measure(make_model(), batch)
    model = make_model()
    model.checkpoint_loops = mode == "loop"
    args = DistributedArgs(model_dtype="fp32", compile=True, activation_checkpointing=mode)
    parallelize_model(model, None, None, args, build_fsdp_grouping_plan(model.args))
    got, _ = measure(model, batch)
    assert got == pytest.approx(want, rel=FP32)


# ---- ranks


def measure_on_ranks(rank, world_size):
    results = []
    for fsdp_type in ("full_shard", "no_shard"):
        model = make_model()
        args = DistributedArgs(fsdp_type=fsdp_type, model_dtype="fp32", dp_replicate=world_size)
        mesh = get_device_mesh(args)
        parallelize_model(model, mesh, None, args, build_fsdp_grouping_plan(model.args))
        x, target, _ = make_batch(2 * world_size)
        mine = slice(2 * rank, 2 * rank + 2)
        set_gradient_sync(model, False)  # as after gradient accumulation
        results.append(measure(model, (x[mine], target[mine], None), mesh)[0])
    return results


def test_two_ranks_measure_like_one_process():
    want, _ = measure(make_model(), make_batch(4))
    for results in run_ranks(2, measure_on_ranks):
        for got in results:
            assert got == pytest.approx(want, rel=FP32_MODEL)
