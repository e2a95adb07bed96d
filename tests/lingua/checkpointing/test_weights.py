"""Weight files: consolidate a checkpoint, and start a run from a file."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import lingua.checkpointing.weights
from lingua import distributed as ld
from lingua.checkpoint import consolidate_checkpoints
from lingua.checkpointing.weights import load_initial_weights, read_weights, write_weights
from lingua.errors import UserError
from tests.lingua.checkpointing.checkpoint_runs import CONFIG, assert_same_bits, build
from tests.lingua.dist_utils import run_ranks
from tests.lingua.toy import make_model, whole

# ---- consolidate


def test_a_consolidated_file_holds_only_weights(run, tmp_path):
    manager, model, *_ = run
    folder = manager.existing_saves[-1]
    (folder / "consolidated").mkdir()  # as a killed consolidation leaves it
    (folder / "consolidated" / "params.json").write_text("half")

    consolidated = consolidate_checkpoints(folder)

    assert {p.name for p in consolidated.iterdir()} == {"consolidated.pth", "params.json"}
    assert json.loads((consolidated / "params.json").read_text()) == CONFIG
    content = torch.load(consolidated / "consolidated.pth", weights_only=True)
    assert content.keys() == {"model"}
    assert_same_bits(content["model"], dict(model.state_dict()))

    dcp_to_torch_save(folder, tmp_path / "all.pth")
    everything = torch.load(tmp_path / "all.pth")
    assert_same_bits(everything["model"], dict(model.state_dict()))
    assert everything["optim"]["state"].keys() == dict(model.named_parameters()).keys()
    for source in (folder, consolidated / "consolidated.pth", tmp_path / "all.pth"):
        assert_same_bits(read_weights(source, "ckpt"), dict(model.state_dict()))


def test_half_a_consolidation_is_repeated(run):
    manager, model, *_ = run
    folder = manager.existing_saves[-1]
    consolidated = consolidate_checkpoints(folder)
    (consolidated / "params.json").unlink()
    (consolidated / "consolidated.pth").write_bytes(b"of another program")
    consolidate_checkpoints(folder)
    content = torch.load(consolidated / "consolidated.pth", weights_only=True)
    assert_same_bits(content["model"], dict(model.state_dict()))
    assert json.loads((consolidated / "params.json").read_text()) == CONFIG


def test_a_consolidation_that_fails_leaves_no_file(run, monkeypatch):
    folder = run[0].existing_saves[-1]

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lingua.checkpointing.weights.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        consolidate_checkpoints(folder)
    assert [p.name for p in (folder / "consolidated").iterdir()] == ["params.json"]


def test_consolidating_another_folder_fails(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint folder: .metadata"):
        consolidate_checkpoints(tmp_path)


# ---- start a run from a weight file

FILES = pytest.mark.parametrize("name", ["consolidated.pth", "model.safetensors"])


def weights_of(seed):
    state = make_model().state_dict()
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def check_initial_weights(rank, world_size, file):
    args = ld.DistributedArgs(model_dtype="fp32", fsdp_type="full_shard", dp_shard=world_size)
    mesh = ld.get_device_mesh(args)
    model, *_ = build(mesh, args)
    load_initial_weights(str(file), model)
    assert_same_bits({n: whole(p).detach() for n, p in model.named_parameters()}, weights_of(1))


@FILES
def test_a_sharded_model_starts_from_a_file(name, tmp_path):
    pytest.importorskip("safetensors")
    write_weights(tmp_path / name, weights_of(1), metadata={})
    run_ranks(2, check_initial_weights, tmp_path / name)


@FILES
def test_a_model_starts_from_a_file_or_its_folder(name, tmp_path):
    pytest.importorskip("safetensors")
    write_weights(tmp_path / name, weights_of(1), metadata={})
    for path in (tmp_path, tmp_path / name):
        model, *_ = build()
        load_initial_weights(str(path), model)
        assert_same_bits(dict(model.state_dict()), weights_of(1))


def test_a_file_of_another_model_does_not_load(tmp_path):
    weights = weights_of(1)
    del weights["rho"]
    write_weights(tmp_path / "consolidated.pth", weights, metadata={})
    model, *_ = build()
    with pytest.raises(
        UserError, match=r"checkpoint\.init_ckpt_path=.* does not fit the model: rho"
    ):
        load_initial_weights(str(tmp_path), model)
    with pytest.raises(UserError, match=r"checkpoint\.init_ckpt_path=nowhere"):
        load_initial_weights("nowhere", model)
