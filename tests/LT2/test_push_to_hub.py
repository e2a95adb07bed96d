"""Upload a folder to a stand-in of the Hub, with failures on the way."""

from __future__ import annotations

import json

import pytest

from apps.LT2.scripts import push_to_hub
from lingua.errors import MachineFault, UserError
from tests.LT2.huggingface.stand_in_hub import run_stand_in_hub

hub_package = pytest.importorskip("huggingface_hub")
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
CONTENT = {
    "config.json": b'{"model_type": "lt2"}',
    "README.md": b"---\nlibrary_name: transformers\n---\n# demo\n",
    "model.safetensors": b"weights" * 100_000,
    "modeling_lt2.py": b"import torch\n",
}


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # lm_eval's tests leave it on
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    with run_stand_in_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    (folder / ".secrets").write_text("not sent")
    return folder


def push(folder, repo="user/demo", **options):
    push_to_hub.main([str(folder), f"repo={repo}", *(f"{k}={v}" for k, v in options.items())])


def fails(kind, match, *args, **options):
    with pytest.raises(kind, match=match) as caught:
        push(*args, **options)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


def test_the_files_arrive_in_a_private_repository(hub, folder, capfd):
    push(folder, message="First upload")
    assert hub.files == CONTENT and hub.private == {"user/demo": True}
    assert hub.messages == ["First upload"]
    assert f"Bearer {TOKEN}" in hub.tokens
    printed = "".join(capfd.readouterr())
    assert f"{hub.url}/user/demo/commit/1" in printed and TOKEN not in printed
    (folder / "README.md").write_text("# changed\n")
    push(folder, private="true")
    assert hub.files["README.md"] == b"# changed\n"


def test_public_is_asked_for(hub, folder):
    push(folder, private="false")
    assert hub.private == {"user/demo": False}
    hub.files.clear()
    fails(UserError, "private=false", folder)
    assert hub.files == {}


def test_a_dry_run_needs_no_token_and_sends_nothing(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(hub_package, "get_token", lambda: None)
    push(folder, dry_run="true")
    printed = capsys.readouterr().out
    for name, content in CONTENT.items():
        assert f"{len(content):,} bytes  {name}" in printed
    assert ".secrets" not in printed and "4 files" in printed
    assert hub.private == {} and hub.tokens == set()


def test_a_missing_token(hub, folder, monkeypatch):
    monkeypatch.setattr(hub_package, "get_token", lambda: None)
    fails(UserError, "HF_TOKEN", folder)
    assert hub.tokens == set()


@pytest.mark.parametrize(
    "repo", ["demo", "a/b/c", "user/", "user/de mo", "user/x--y", "user/x.git", ""]
)
def test_a_bad_repository_name(hub, folder, repo):
    fails(UserError, f"repo={repo}", folder, repo)
    assert hub.tokens == set()


def test_a_folder_that_is_no_export(hub, folder, tmp_path):
    fails(UserError, "folder=", tmp_path / "nothing")
    fails(UserError, "config.json", tmp_path)
    fails(UserError, "folder=", folder / "config.json")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(UserError, "model-00001-of-00002.safetensors", folder)
    for content in ("[1]", "{", '{"dim": 3}'):
        (folder / "config.json").write_text(content)
        fails(UserError, "config.json", folder)
    assert hub.tokens == set()


@pytest.mark.parametrize(
    "part, status, kind",
    [
        ("repos/create", 401, UserError),
        ("repos/create", 403, UserError),
        ("preupload", 403, UserError),
        ("/objects/", 403, UserError),
        ("/commit/", 413, MachineFault),
        ("/commit/", 500, MachineFault),
        ("objects/batch", 422, MachineFault),
    ],
)
def test_a_refusal_is_one_line(hub, folder, part, status, kind):
    hub.fail = {part: (status, "No rights for this\nrepository")}
    fails(kind, f"repo=user/demo.*{status}.*No rights", folder)
    assert hub.files == {}
    hub.fail.clear()
    push(folder)
    assert hub.files == CONTENT


def test_a_cut_upload_is_repeated(hub, folder):
    hub.cut_uploads = 1
    push(folder)
    assert hub.files == CONTENT


def test_a_lost_connection_is_one_line_and_the_next_run_finishes(hub, folder):
    hub.cut_uploads = 100
    fails(MachineFault, "repo=user/demo.*same command", folder)
    assert hub.files == {}
    hub.cut_uploads = 0
    push(folder)
    assert hub.files == CONTENT


def test_no_server_at_all(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    fails(MachineFault, "repo=user/demo", folder)
