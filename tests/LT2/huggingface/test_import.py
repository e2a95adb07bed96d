"""A run, exported to a Hugging Face folder, becomes a run again."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from apps.LT2.huggingface.export import write_model
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts import export_weights, import_hf
from lingua.errors import UserError
from tests.LT2.huggingface.exported import load
from tests.LT2.mixer_cases import QWEN
from tests.LT2.tiny import KINDS, save_run, tiny_model
from tests.LT2.tiny_run import SMALL, column, train

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
EOS = {"eos_token_id": 257}


def export(folder, kind="hybrid", **changes):
    """Write a tiny model of two loops; return it."""
    model = tiny_model(kind, 2, **changes)
    folder.mkdir()
    write_model(folder, model.args, model.state_dict(), dtype=torch.float32, tokens=EOS)
    return model


def import_(folder, out, *options):
    import_hf.main([f"hf={folder}", f"out={out}", "tokenizer.name=bytes", *options])
    return load_model_and_tokenizer(str(out), dtype="fp32", device="cpu").model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_options_come_back(kind, tmp_path):
    changes = {"norm_eps": 1e-3, "weight_tying": kind in ("full", "gdn"), "max_seqlen": 77}
    changes |= {"mixer_norm_eps": 1e-2} | (QWEN if kind in ("full", "gdn+dsa") else {})
    model = export(tmp_path / "hf", kind, **changes)
    back = import_(tmp_path / "hf", tmp_path / "back")
    assert asdict(back.args) == asdict(model.args)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


def test_a_folder_with_other_loops_is_the_model_it_was_there(tmp_path):
    export(tmp_path / "hf")
    theirs = load(tmp_path / "hf", loop_count=3)
    theirs.save_pretrained(tmp_path / "again")
    back = import_(tmp_path / "again", tmp_path / "back")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(tokens), theirs(tokens).logits)


def test_an_exit_gate_survives_transformers(tmp_path):
    model = export(tmp_path / "hf", "full", loop_loss="gate")
    theirs = load(tmp_path / "hf", dtype=torch.bfloat16)
    assert theirs.model.exit_gate.weight.dtype == torch.float32
    theirs.save_pretrained(tmp_path / "again")
    back = import_(tmp_path / "again", tmp_path / "back")
    assert model.exit_gate is not None and back.exit_gate is not None
    for name, weight in model.exit_gate.state_dict().items():
        assert weight.any() and torch.equal(back.exit_gate.state_dict()[name], weight)


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_tokenizer_comes_back(add_bos, tmp_path):
    data = {"tokenizer": {"name": "bytes"}, "add_bos": add_bos}
    save_run(tmp_path / "run", tiny_model("full", 2, n_layers=1), data=data)
    export_weights.main([f"ckpt={tmp_path / 'run'}", "format=hf", f"out={tmp_path / 'hf'}"])
    import_hf.main([f"hf={tmp_path / 'hf'}", f"out={tmp_path / 'back'}"])
    _, tokenizer, config = load_model_and_tokenizer(str(tmp_path / "back"), device="cpu")
    assert tokenizer.encode("äa", True, True) == [256, *"äa".encode(), 257]
    assert config["data"]["add_bos"] == add_bos


def test_training_continues_at_the_loss_it_had(data, tmp_path):
    """A run from the imported folder is the run from the checkpoint."""
    options = {**SMALL, "eval.validation": None, "steps": 3}
    first = train(data, tmp_path / "first", **options)
    export_weights.main([f"ckpt={first}", "format=hf", f"out={tmp_path / 'hf'}"])
    import_(tmp_path / "hf", tmp_path / "back")
    options |= {"steps": 2, "optim.lr": 1e-3, "optim.warmup": 0}
    losses = {}
    for name, source in (("ckpt", first), ("hf", tmp_path / "back")):
        run = train(data, tmp_path / name, **options, **{"checkpoint.init_ckpt_path": source})
        assert "model differs" not in (run / "train.log").read_text()
        losses[name] = column(run, "loss/out")
    assert losses["hf"] == losses["ckpt"]
    assert losses["hf"][0] < column(first, "loss/out")[0] - 0.3


def config(**changes):
    def spoil(folder):
        file = folder / "config.json"
        content = json.loads(file.read_text())
        content["model"] |= changes.pop("model", {})
        file.write_text(json.dumps(content | changes))

    return spoil


def without_model(folder):
    (folder / "config.json").write_text('{"model_type": "lt2"}')


def weights(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        tensors = safetensors.load_file(file)
        change(tensors)
        safetensors.save_file(tensors, file)

    return spoil


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (config(model={"moe": 8}), [], "config.json: model.moe is not an option of this version"),
        (config(model={"gdn": {"rank": 8}}), [], "config.json: model.gdn.rank is not an option"),
        (config(model={"mixer": "rwkv"}), [], "model.mixer='rwkv'"),
        (config(model={"dim": "wide"}), [], "config.json: dim=wide: expected int"),
        (config(vocab_size=100), [], "258 tokens, more than the vocabulary"),
        (without_model, [], "config.json has no 'model'"),
        (config(model={"n_layers": 4}), [], "tensors are missing.* model.layers.3"),
        (weights(lambda t: t.pop("model.norm.weight")), [], "tensors are missing.* model.norm"),
        (weights(lambda t: t.update(extra=torch.ones(2))), [], "tensors are unknown.* extra"),
        (
            weights(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
            [],
            r"norm.weight: \(3,\)",
        ),
        (lambda _: None, ["loop_count=4"], "loop_count.* need a Llama"),
        (lambda _: None, ["layers=[0]"], "layers need a Llama"),
    ],
)
def test_bad_folders_are_refused(spoil, options, message, tmp_path):
    export(tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as error:
        import_(tmp_path / "hf", tmp_path / "out", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "params.json").exists()
