"""A tokenizer file that is replaced after training is not used for the same model by mistake."""

from __future__ import annotations

import json
import shutil

import pytest

from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts import export_weights
from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs, with_sha256
from tests.lingua.tokenizer_kinds import byte_level
from tests.LT2.test_train_end import write_params
from tests.LT2.tiny_run import SMALL, checkpoint, train, write_corpus

SHA256 = "data.tokenizer.sha256"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps, whose tokenizer is in `tok`, and another tokenizer in `new`."""
    root = tmp_path_factory.mktemp("run")
    for name, specials in (("tok", ("<s>", "</s>")), ("new", ("</s>", "<s>"))):
        (root / name).mkdir()
        byte_level(root / name, specials)
    train(write_corpus(root / "data"), root / "run", **options(root), steps=2)
    return root


def options(root):
    return {**SMALL, "data.tokenizer.name": "hf", "data.tokenizer.path": root / "tok"}


@pytest.fixture
def replaced(run, tmp_path):
    """A copy of the run, with another tokenizer of the same size in the old place."""
    root = shutil.copytree(run, tmp_path / "copy")
    shutil.copytree(root / "new", root / "tok", dirs_exist_ok=True)
    edit(root, lambda data: data["tokenizer"].update(path=str(root / "tok")))
    return root


def edit(root, change):
    params = checkpoint(root / "run", 2) / "params.json"
    saved = json.loads(params.read_text())
    saved["data"]["root_dir"] = str(root / "data")
    change(saved["data"])
    write_params(params, saved)


def load(ckpt, **given):
    return load_model_and_tokenizer(str(ckpt), device="cpu", **given)


def test_the_same_tokenizer_may_move(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "moved")
    train(root / "data", root / "run", **options(root), steps=3)
    load(root / "run", tokenizer_path=str(root / "tok" / "tokenizer.json"))


def test_another_tokenizer_is_refused(replaced):
    data, dump_dir = replaced / "data", replaced / "run"
    with pytest.raises(UserError, match=rf"data\.tokenizer\.path=.*{SHA256}"):
        train(data, dump_dir, **options(replaced), steps=3)
    with pytest.raises(UserError, match=rf"finished run: .*{SHA256}"):
        train(data, dump_dir, **options(replaced), steps=2)
    with pytest.raises(UserError, match=rf"{SHA256}.*tokenizer_path="):
        load(dump_dir)


def test_another_tokenizer_can_be_chosen_and_exported(replaced, tmp_path, caplog):
    path = str(replaced / "tok")
    load(replaced / "run", tokenizer_path=path)
    assert SHA256 in caplog.text
    out = tmp_path / "out"
    given = [f"ckpt={replaced / 'run'}", f"tokenizer_path={path}", "format=safetensors"]
    export_weights.main([*given, f"out={out}"])
    saved = load(out).config["data"]["tokenizer"]
    assert saved["sha256"] == with_sha256(TokenizerArgs("hf", path)).sha256


def test_a_checkpoint_without_the_sha256_resumes(replaced, caplog):
    edit(replaced, lambda data: data["tokenizer"].pop("sha256"))
    train(replaced / "data", replaced / "run", **options(replaced), steps=2)
    load(replaced / "run")
    train(replaced / "data", replaced / "run", **options(replaced), steps=3)
    assert SHA256 not in caplog.text
