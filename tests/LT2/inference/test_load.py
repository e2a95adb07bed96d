"""Loading a checkpoint gives the saved model, or a one-line error."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from torch.optim import AdamW

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import load_model_and_tokenizer, resolve_device
from apps.LT2.transformer import LoopedTransformer
from lingua.checkpoint import CheckpointArgs, CheckpointManager, consolidate_checkpoints
from lingua.errors import UserError
from lingua.optim import is_matrix
from tests.lingua.tokenizer_kinds import TOKENIZER_KINDS
from tests.LT2.tiny import KINDS, AtStep, save_run, tiny_args, tiny_model

TOKENS = torch.tensor([[256, *b"what is asked"]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dump dir with two checkpoints of tiny_model("hybrid", 2, seed=step)."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        save_run(folder, tiny_model("hybrid", 2, seed=step), step)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A step folder that a test may damage."""
    return shutil.copytree(run / "checkpoints" / "0000000002", tmp_path / "0000000002")


def load(ckpt, **options):
    return load_model_and_tokenizer(str(ckpt), dtype="fp32", device="cpu", **options)


def edit_params(folder, change):
    file = folder / "params.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    (folder / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_of_a_checkpoint_give_the_saved_model(kind, tmp_path):
    model = tiny_model(kind, 2)
    step = save_run(tmp_path, model)
    consolidated = consolidate_checkpoints(step)
    want = model(TOKENS)
    for ckpt in (tmp_path, step.parent, step, consolidated, consolidated / "consolidated.pth"):
        loaded = load(ckpt)
        assert torch.equal(loaded.model(TOKENS), want), ckpt
        assert loaded.tokenizer.n_words == 258 and loaded.config["model"]["dim"] == 32
        assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_run_loads_its_newest_undamaged_checkpoint(run, tmp_path):
    assert torch.equal(load(run).model(TOKENS), tiny_model("hybrid", 2, seed=2)(TOKENS))

    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "checkpoints" / "0000000002" / "__0_0.distcp").write_bytes(b"cut")
    (copied / "checkpoints" / "0000000003.tmp").mkdir()
    assert torch.equal(load(copied).model(TOKENS), tiny_model("hybrid", 2, seed=1)(TOKENS))


def test_a_step_folder_without_shards_loads_its_consolidated_weights(copy):
    consolidate_checkpoints(copy)
    for file in [*copy.glob("*.distcp"), copy / ".metadata"]:
        file.unlink()
    assert torch.equal(load(copy).model(TOKENS), tiny_model("hybrid", 2, seed=2)(TOKENS))


@pytest.mark.parametrize("form", ["step folder", "consolidated"])
def test_only_weight_matrices_are_cast(copy, form):
    ckpt = copy if form == "step folder" else consolidate_checkpoints(copy)
    model, tokenizer, _ = load_model_and_tokenizer(str(ckpt), dtype="bf16", device="cpu")
    original = dict(tiny_model("hybrid", 2, seed=2).named_parameters())
    dtypes = {True: torch.bfloat16, False: torch.float32}
    for name, param in model.named_parameters():
        assert torch.equal(param, original[name].to(dtypes[is_matrix(name, param)])), name
    assert {p.dtype for p in model.parameters()} == set(dtypes.values())
    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=4)
    PackedCausalTransformerGenerator(cfg, model, tokenizer).generate(["it", "decodes"])


@pytest.mark.parametrize("loop_count, rows", [(1, [0]), (2, [0, 1]), (4, [0, 1, 1, 1])])
@pytest.mark.parametrize("form", ["step folder", "consolidated"])
def test_more_loops_reuse_the_last_gate(copy, loop_count, rows, form):
    ckpt = copy if form == "step folder" else consolidate_checkpoints(copy)
    trained = tiny_model("hybrid", 2, seed=2)
    want = LoopedTransformer(tiny_args("hybrid", loop_count))
    want.load_state_dict(trained.state_dict() | {"rho": trained.rho[rows]})
    assert torch.equal(load(ckpt, loop_count=loop_count).model(TOKENS), want(TOKENS))


def test_models_without_gates_and_with_tied_embeddings(tmp_path):
    model = tiny_model("full", 2, use_residual=False, weight_tying=True)
    step = save_run(tmp_path, model)
    assert torch.equal(load(step).model(TOKENS), model(TOKENS))
    assert load(consolidate_checkpoints(step), loop_count=3).model.n_loops == 3


def test_optimizer_state_is_ignored(tmp_path):
    model = tiny_model("full", 1).requires_grad_(True)
    optimizer = AdamW(model.parameters())
    model(TOKENS).sum().backward()
    optimizer.step()
    manager = CheckpointManager(CheckpointArgs(path=str(tmp_path)))
    config = {"model": asdict(model.args), "data": {"tokenizer": {"name": "bytes"}}}
    manager.save(model, optimizer, AtStep(1), config)
    assert torch.equal(load(tmp_path).model(TOKENS), model(TOKENS))


def test_an_unavailable_attention_backend_is_replaced(copy, caplog):
    edit_params(copy, lambda config: config["model"].update(attn_impl="fmha"))
    assert load(copy).model.args.attn_impl == "auto"
    assert "fmha" in caplog.text


def test_the_tokenizer_file_may_have_moved(copy, tmp_path):
    def change(config):
        config["data"]["tokenizer"] = {"name": "tiktoken", "path": "/nowhere/tokenizer.model"}

    edit_params(copy, change)
    with pytest.raises(UserError, match="/nowhere/tokenizer.model.*tokenizer_path"):
        load(copy)
    with pytest.raises(UserError, match=str(tmp_path / "here")):
        load(copy, tokenizer_path=str(tmp_path / "here"))


def cut_shards(folder):
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])


def foreign_cut_shards(folder):
    (folder / "manifest.json").unlink()
    cut_shards(folder)


def bad_pth(folder):
    for file in [*folder.glob("*.distcp"), folder / ".metadata"]:
        file.unlink()
    (folder / "consolidated").mkdir()
    shutil.copy(folder / "params.json", folder / "consolidated")
    (folder / "consolidated" / "consolidated.pth").write_bytes(b"PK nothing")


def params(**changes):
    return lambda folder: edit_params(folder, lambda config: config["model"].update(changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: shutil.rmtree(folder), "no such file or folder"),
        (lambda folder: (folder / ".metadata").unlink(), "metadata is missing"),
        (lambda folder: (folder / "params.json").unlink(), "params.json.*missing"),
        (lambda folder: (folder / "params.json").write_text("{"), "not readable"),
        (lambda folder: edit_params(folder, lambda c: c.pop("model")), "section `model`"),
        (lambda folder: edit_params(folder, lambda c: c.pop("data")), "section `data`"),
        (params(vocab_size=100), "model.vocab_size=100.*258"),
        (params(n_layer=3), "params.json, section model: unknown option n_layer"),
        (params(n_layers=6), "layers.3"),
        (params(dim=64), r"\(32,\) in the checkpoint, \(64,\) in the model"),
        (cut_shards, "damaged: __0_0.distcp"),
        (foreign_cut_shards, "not readable"),
        (bad_pth, "not readable"),
    ],
)
def test_a_bad_checkpoint_is_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        load(copy)
    assert str(copy) in str(error.value)


def test_a_model_with_fewer_layers_does_not_load(copy):
    consolidated = consolidate_checkpoints(copy)
    for folder in (copy, consolidated):
        edit_params(folder, lambda c: c["model"].update(n_layers=1, attention_pattern=None))
        with pytest.raises(UserError, match="does not fit the model: layers.1"):
            load(folder)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu:9", "nonsense"])
def test_unavailable_devices(run, device):
    with pytest.raises(UserError, match=f"device={device}"):
        load_model_and_tokenizer(str(run), device=device)


def test_an_unknown_gpu_lists_those_that_exist(monkeypatch):
    for count, choices in ((0, "auto, cpu"), (2, "auto, cpu, cuda, cuda:0, cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(UserError, match=f"device=cuda:2 must be one of {choices} on"):
            resolve_device("cuda:2")


def test_a_loop_count_that_does_not_fit_the_pattern(tmp_path):
    step = save_run(tmp_path, tiny_model("full", 2, attention_pattern="4->full"))
    with pytest.raises(UserError, match="2 segments"):
        load(step, loop_count=3)


def test_a_run_whose_tokenizer_has_no_bos_now_is_logged(tmp_path, caplog):
    name, path = TOKENIZER_KINDS["metaspace"](tmp_path)
    data = {"tokenizer": {"name": name, "path": path}, "add_bos": True}
    save_run(tmp_path, tiny_model("full", 1, n_layers=1), data=data)
    load_model_and_tokenizer(str(tmp_path), device="cpu")
    assert "data.add_bos=true" in caplog.text
