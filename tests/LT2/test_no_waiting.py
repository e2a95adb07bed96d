"""No host-device syncs in prefill, steps and training, and no graph breaks in prefill.

The host knows which rows are empty and where documents end. Reading this from the device would
sync in every (loop, layer).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apps.LT2.batch import to_device
from apps.LT2.evaluation.scoring import Window, score_batch
from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.kernel.documents import host_cu_seqlens, upload_cu_seqlens
from lingua.tokenizer import ByteTokenizer
from tests.LT2.tiny import KINDS, tiny_model
from tests.waiting import WouldWait, no_waiting


def prompt(*shape: int) -> Tensor:
    return torch.randint(258, shape, generator=torch.Generator().manual_seed(0))


# ---- the detector


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave(x),
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique_consecutive(),
        lambda x: torch.equal(x, x),
    ],
)
def test_syncs_are_detected(read):
    x = torch.arange(3)
    read(x)
    with no_waiting(), pytest.raises(WouldWait):
        read(x)
    read(x)


# ---- the model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_prefill_and_steps_do_not_sync(kind, packed):
    """With empty rows, and with rows that hold tokens."""
    model = tiny_model(kind, 1)
    cache = model.init_cache(3, 40)
    for offsets in ([0, 5, 6, 20], [0, 9, 9, 20]):
        tokens = prompt(1, 20) if packed else prompt(3, 7)
        cu_seqlens = upload_cu_seqlens(offsets, "cpu") if packed else None
        with no_waiting():
            model.prefill(tokens, cache, cu_seqlens=cu_seqlens, rows=[2, 0, 1])
    with no_waiting():
        model.step(prompt(3, 1), cache)
        cache.reset([1])
        cache.copy_rows([1], cache, [2])
        model.step(prompt(3, 1), cache)
    assert cache.lengths == ([3, 16, 16] if packed else [16, 16, 16])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("doc_mask", [False, True])
def test_forward_and_backward_do_not_sync(kind, doc_mask):
    model = tiny_model(kind, 2).requires_grad_(True)
    views = prompt(2, 20, 3).numpy()
    views[..., -1] = 0
    views[0, [0, 5, 6], -1] = 1  # first tokens of documents
    batch = to_device(views, doc_mask, torch.device("cpu"))
    n_targets = torch.tensor(40.0)
    with no_waiting():
        model(*batch, n_targets).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefill_without_the_hosts_numbers_reads_them_from_the_device(kind, monkeypatch):
    model = tiny_model(kind, 1)
    known, unknown = model.init_cache(3, 40), model.init_cache(3, 40)
    extend = unknown.extend
    monkeypatch.setattr(unknown, "extend", lambda *args: [extend(*args), None][1])
    for offsets in ([0, 5, 6, 20], [0, 9, 9, 20]):
        tokens, uploaded = prompt(1, 20), upload_cu_seqlens(offsets, "cpu")
        want = model.prefill(tokens, known, cu_seqlens=uploaded, rows=[2, 0, 1])
        plain, rows = torch.tensor(offsets, dtype=torch.int32), torch.tensor([2, 0, 1])
        assert torch.equal(model.prefill(tokens, unknown, cu_seqlens=plain, rows=rows), want)


def test_changed_cu_seqlens_are_read_again():
    cu_seqlens = upload_cu_seqlens([0, 2, 5], "cpu")
    with no_waiting():
        assert host_cu_seqlens(cu_seqlens) == [0, 2, 5]
    cu_seqlens[1] = 3
    assert host_cu_seqlens(cu_seqlens) == [0, 3, 5]


# ---- graph breaks


CASES = [(kind, True, "continued") for kind in ("full", "window", "nsa", "dsa")]
# The linear mixers share their prefill; on CPU it reads cu_seqlens in Python.
CASES += [(kind, False, "empty") for kind in ("full", "dsa", "gdn")]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind, packed, past", CASES)
def test_a_compiled_prefill_has_no_graph_break(kind, packed, past):
    model = tiny_model(kind, 1, n_layers=1)
    plain, compiled = model.init_cache(3, 40), model.init_cache(3, 40)
    cu_seqlens = upload_cu_seqlens([0, 5, 9, 20], "cpu") if packed else None
    tokens = prompt(1, 20) if packed else prompt(3, 7)
    if past == "continued":
        for cache in (plain, compiled):
            model.prefill(tokens, cache, cu_seqlens=cu_seqlens, rows=[2, 0, 1])
    want = model.prefill(tokens, plain, cu_seqlens=cu_seqlens, rows=[2, 0, 1])
    for block in model.layers:
        block.prefill = torch.compile(block.prefill, fullgraph=True, backend="eager")
    got = model.prefill(tokens, compiled, cu_seqlens=cu_seqlens, rows=[2, 0, 1])
    assert torch.equal(got, want)


# ---- one copy per batch or step


@pytest.fixture
def fetches(monkeypatch) -> list[str]:
    """The names of the calls in this test that copy numbers to the host."""
    calls: list[str] = []

    def counted(name: str):
        inner = getattr(Tensor, name)

        def count(self: Tensor, *args, **options):
            calls.append(name)
            return inner(self, *args, **options)

        return count

    for name in ("cpu", "tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_scores_is_copied_once(kind, fetches, monkeypatch):
    model = tiny_model(kind, 1)
    monkeypatch.setattr("apps.LT2.evaluation.scoring.LOGITS_AT_ONCE", 3 * 258)  # several parts
    windows = [Window(i, list(range(9, 9 + n)), n // 2) for i, n in enumerate((12, 4, 7))]
    fetches.clear()
    score_batch(model, windows)
    assert fetches.count("cpu") == 1
    # Later reads are on the host.
    assert fetches[0] == "cpu" and set(fetches[1:]) <= {"tolist", "__bool__"}


@pytest.mark.parametrize("kind", ["full", "hybrid", "dsa"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_of_generation_copies_only_its_tokens(kind, temperature, fetches):
    model = tiny_model(kind, 2)
    cfg = PackedCausalTransformerGeneratorArgs(
        max_gen_len=5, max_tokens=30, temperature=temperature, top_p=0.9, top_k=50
    )
    generator = PackedCausalTransformerGenerator(cfg, model, ByteTokenizer())
    # Two rows for two prompts with three answers each: rows are refilled and copied.
    answers = generator.complete(["once", "upon a"], num_samples=3, score=False)
    n_moves = 0
    run = generator._run

    def count_moves(*args):
        nonlocal n_moves
        for moved in run(*args):
            n_moves += 1
            yield moved

    generator._run = count_moves
    fetches.clear()
    assert len([*answers]) == 6
    assert n_moves > 6
    assert fetches == ["tolist"] * n_moves
