"""The download scripts: their requests to the hub, their output, and bad options."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
from lingua.dataloader.args import DataArgs
from lingua.errors import UserError, is_machine_fault
from lingua.prepare.corpus import format_bytes
from lingua.tokenizer import TokenizerArgs, build_tokenizer
from tests.LT2.tiny_run import SMALL, train
from tests.setup_scripts import SETUP, load_script

data = load_script("download_prepare_hf_data")
tokenizers = load_script("download_tokenizer")


def write_lines(folder: Path, n: int) -> Path:
    folder.mkdir(parents=True)
    lines = (json.dumps({"text": f"text {i}"}) + "\n" for i in range(n))
    (folder / "a.jsonl").write_text("".join(lines))
    return folder


def prepare(tmp_path: Path, *options: str, name: str = "fineweb_edu_10bt") -> Path:
    out = tmp_path / "data"
    data.main([name, "1", "--data_dir", str(out), "--nchunks", "2", *options])
    return out / f"{name}_shuffled"


class Hub:
    """Replaces huggingface_hub: records requests, and "downloads" a file of lines."""

    def __init__(self, failure: Exception | None = None):
        self.calls: list[tuple[str, dict]] = []
        self.failure = failure
        self.commit = "abc"
        self.missing = 0  # files that do not arrive
        names = [
            "sample/10BT/{}.parquet",
            "data/CC/{}.parquet",
            "global-shard_01_of_10/{}.jsonl.zst",
        ]
        self.names = [name.format(i) for name in names for i in range(2)]

    def HfApi(self):
        return self

    def dataset_info(self, repo_id, *, revision, files_metadata):
        assert files_metadata
        size = len(self.content())
        files = [SimpleNamespace(rfilename=name, size=size) for name in [*self.names, "README.md"]]
        return SimpleNamespace(sha=revision or self.commit, siblings=files)

    def content(self) -> bytes:
        return b"".join(b'{"text": "text %d"}\n' % i for i in range(50))

    def snapshot_download(self, repo_id, **options):
        self.calls.append((repo_id, options))
        [pattern] = options["allow_patterns"]
        wanted = [name for name in self.names if fnmatchcase(name, pattern)]
        for name in wanted[self.missing :]:
            file = Path(options["local_dir"], name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.content())
            if self.failure:
                raise self.failure

    def hf_hub_download(self, repo_id, **options):
        self.calls.append((repo_id, options))
        if self.failure:
            raise self.failure
        path = Path(options["local_dir"]) / options["filename"]
        path.parent.mkdir(parents=True)
        path.write_bytes(b"tokens")
        return str(path)


@pytest.fixture
def hub(monkeypatch):
    def install(failure: Exception | None = None) -> Hub:
        stand_in = Hub(failure)
        for script in (data, tokenizers):
            monkeypatch.setattr(script, "import_optional", lambda *_, **__: stand_in)
        monkeypatch.setattr("lingua.prepare.network.find_obstacle", lambda url: None)
        return stand_in

    return install


# ---- data


def test_a_local_folder_becomes_a_source_that_training_reads(tmp_path, capsys):
    source = write_lines(tmp_path / "some texts", 60)
    options = ("--source_dir", str(source), "--validation_documents", "10")
    out = prepare(tmp_path, *options, name="some_texts")
    printed = capsys.readouterr().out
    assert re.search(r"60 documents, 1\.\d kB, in 2 chunks and a validation file \(10\)", printed)
    args = DataArgs(
        root_dir=str(out.parent),
        sources={out.name: 1.0},
        batch_size=2,
        seq_len=16,
        prefetch_size=2,
        load_async=False,
        seed=1,
        tokenizer=TokenizerArgs(name="bytes"),
    )
    state = init_dataloader_state_from_args(args, rank=1, world_size=2)
    with build_dataloader_from_args(args, state) as batches:
        assert next(batches)[0].shape == (2, 16, 2)


def test_without_validation_documents_training_needs_no_option(tmp_path, capsys):
    """`eval.validation=null` is not needed."""
    source = write_lines(tmp_path / "texts", 60)
    out = prepare(tmp_path, "--source_dir", str(source), "--validation_documents", "0")
    assert capsys.readouterr().out.endswith("kB, in 2 chunks\n")
    options = {**SMALL, "steps": 3, "data.sources": f"{{{out.name}: 1.0}}"}
    for name, validation in (("plain", {}), ("null", {"eval.validation": None})):
        dump_dir = train(out.parent, tmp_path / name, **options, **validation)
        lines = (dump_dir / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3 and "loss/val" not in "".join(lines)


@pytest.mark.parametrize(
    "n, text", [(9, "9 bytes"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (10**12, "1000.0 GB")]
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text


def test_skipped_files_are_listed(tmp_path, capsys):
    source = write_lines(tmp_path / "texts", 60)
    options = ("--source_dir", str(source), "--validation_documents", "10")
    prepare(tmp_path, *options)
    assert "files skipped" not in capsys.readouterr().out
    for name in ("x.csv", "README.md", ".hidden.csv", ".hidden.jsonl"):
        (source / name).write_text("")
    (source / "linked").symlink_to(source)
    prepare(tmp_path, *options)
    [line, *_] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{source}: 4 files skipped (.hidden.jsonl, README.md, linked, ...)")
    assert "end in .txt, .md, .jsonl" in line


def test_only_one_split_of_a_hub_folder_is_prepared(tmp_path, capsys):
    source = tmp_path / "hub"
    (source / "data").mkdir(parents=True)
    for split, n in (("train", 40), ("test", 20), ("validation", 3)):
        table = pyarrow.table({"text": [f"{split} {i}" for i in range(n)]})
        pyarrow.parquet.write_table(table, source / f"data/{split}-00000-of-00001.parquet")

    def prepare_split(name: str, *options: str) -> tuple[set[str], str]:
        out = prepare(
            tmp_path,
            "--source_dir",
            str(source),
            "--validation_documents",
            "1",
            *options,
            name=name,
        )
        lines = [line for file in out.glob("*.jsonl") for line in file.read_text().splitlines()]
        return {json.loads(line)["text"] for line in lines}, capsys.readouterr().out

    texts, printed = prepare_split("a")
    assert texts == {f"train {i}" for i in range(40)}
    assert f"{source}: files of other splits skipped: test (1), validation (1)" in printed
    assert prepare_split("b", "--split", "test")[0] == {f"test {i}" for i in range(20)}
    assert len(prepare_split("c", "--split", "all")[0]) == 63
    with pytest.raises(UserError, match="made from other source files"):
        prepare_split("a", "--split", "test")


@pytest.mark.parametrize(
    "dataset, repo_id, pattern",
    [
        ("fineweb_edu", "HuggingFaceFW/fineweb-edu", "data/*/*.parquet"),
        ("fineweb_edu_10bt", "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
        ("dclm_baseline_1.0", "mlfoundations/dclm-baseline-1.0", "*.jsonl.zst"),
        (
            "dclm_baseline_1.0_10prct",
            "mlfoundations/dclm-baseline-1.0",
            "global-shard_01_of_10/*.jsonl.zst",
        ),
    ],
)
def test_requests_to_the_hub(tmp_path, hub, dataset, repo_id, pattern, monkeypatch):
    stand_in = hub()
    # lines, not parquet
    monkeypatch.setattr(
        "lingua.prepare.corpus.find_document_files",
        lambda root, out: [write_lines(root / "lines", 99) / "a.jsonl"],
    )
    argv = [dataset, "0.5", "--data_dir", str(tmp_path), "--nchunks", "3"]
    data.main([*argv, "--validation_documents", "5"])
    [(asked, options)] = stand_in.calls
    assert asked == repo_id and options["allow_patterns"] == [pattern]
    assert options["repo_type"] == "dataset"
    assert len(list((tmp_path / f"{dataset}_shuffled").glob(f"{dataset}.chunk.*.jsonl"))) == 3


def test_the_installed_hub_takes_these_options():
    import inspect

    hub = pytest.importorskip("huggingface_hub")
    for function, options in (
        (hub.HfApi.dataset_info, {"revision", "files_metadata"}),
        (hub.snapshot_download, {"repo_type", "revision", "local_dir", "allow_patterns"}),
        (hub.hf_hub_download, {"filename", "local_dir", "token"}),
    ):
        assert options <= inspect.signature(function).parameters.keys()


@pytest.fixture
def parquet_hub(hub):
    stand_in = hub()
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(50)]}), sink)
    stand_in.content = lambda: sink.getvalue().to_pybytes()
    return stand_in


def test_a_download_resumes_with_its_first_commit(tmp_path, parquet_hub):
    few = ("--validation_documents", "5")
    parquet_hub.failure = RuntimeError("no route\nto host")  # HTTP libraries raise their own types
    with pytest.raises(UserError, match="no route; run the same command again"):
        prepare(tmp_path, *few)
    parquet_hub.failure, parquet_hub.commit = None, "def"
    out = prepare(tmp_path, *few)
    assert [options["revision"] for _, options in parquet_hub.calls] == ["abc", "abc"]
    assert json.loads((out / "manifest.json").read_text())["documents"] == 100
    parquet_hub.dataset_info = None  # the hub is not asked again
    prepare(tmp_path, *few)
    out.rename(tmp_path / "away")
    prepare(tmp_path, *few)
    shutil.rmtree(tmp_path / "data/fineweb_edu_10bt")
    prepare(tmp_path, *few)


def test_a_download_without_a_file_is_incomplete(tmp_path, parquet_hub):
    """Without a network the client succeeds if the folder is not empty."""
    parquet_hub.missing = 1
    with pytest.raises(UserError, match=r"10BT/0.parquet is incomplete: 0 of \d+ bytes"):
        prepare(tmp_path)
    parquet_hub.missing = 0
    prepare(tmp_path, "--validation_documents", "5")


def test_a_removed_file_is_downloaded_again(tmp_path, parquet_hub):
    few = ("--validation_documents", "5")
    prepare(tmp_path, *few).rename(tmp_path / "away")
    (tmp_path / "data/fineweb_edu_10bt/sample/10BT/1.parquet").unlink()
    out = prepare(tmp_path, *few)
    assert len(parquet_hub.calls) == 2
    assert json.loads((out / "manifest.json").read_text())["documents"] == 100


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "texts", 60)

    def full(*_):
        raise OSError(28, "No space left on device")

    options = ("--source_dir", str(source), "--validation_documents", "10")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr("lingua.prepare.shuffle.os.fsync", full)
        prepare(tmp_path, *options)
    assert is_machine_fault(caught.value)
    assert (prepare(tmp_path, *options) / "manifest.json").is_file()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["fineweb", "64"], "'fineweb' must be one of .*fineweb_edu_10bt.*--source_dir"),
        (["a/b", "64", "--source_dir", "."], "'a/b' must be letters"),
        (["fineweb_edu"], "memory"),
        (["fineweb_edu", "lots"], "lots"),
        (["fineweb_edu", "0"], "memory=0.0 must be"),
        (["fineweb_edu", "nan"], "memory=nan must be"),
        (["fineweb_edu", "64", "--nchunks", "0"], "--nchunks 0 must be at least 1"),
        (["fineweb_edu", "64", "--validation_documents", "-1"], "documents -1 must be at least 0"),
        (["fineweb_edu", "64", "--source_dir", "/no/such"], "/no/such: no such file or folder"),
        (["fineweb_edu", "64", "--split", "test"], "--split test needs --source_dir"),
        (["fineweb_edu", "64", "--text_field", "x"], "--text_field needs --source_dir"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        data.main([*argv, "--data_dir", str(tmp_path)] if len(argv) > 1 else argv)


def test_a_mistake_ends_the_script_with_status_2(tmp_path):
    script = str(SETUP / "download_prepare_hf_data.py")
    done = subprocess.run(
        [sys.executable, script, "fineweb_edu", "-1"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


# ---- tokenizers


def test_llama3_is_saved_where_the_recipes_expect_it(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in = hub()
    tokenizers.main(["llama3", "tokenizer", "--api_key", "hf_secret"])
    [(asked, options)] = stand_in.calls
    assert asked == "meta-llama/Meta-Llama-3-8B" and options["token"] == "hf_secret"
    printed = capsys.readouterr().out
    assert "data.tokenizer.path=tokenizer/original/tokenizer.model" in printed
    assert "data.tokenizer.name=tiktoken" in printed and "secret" not in printed


def test_without_a_key_the_hub_uses_its_own(tmp_path, hub):
    stand_in = hub()
    tokenizers.main(["gemma", str(tmp_path / "t")])
    assert stand_in.calls[0][1]["token"] is None


@pytest.mark.parametrize("status", [401, 403, 404, None])
def test_a_key_is_not_printed_if_the_download_fails(tmp_path, hub, status):
    """Only a refusal has to do with the terms."""
    failure = RuntimeError("no space for token hf_secret")
    if status:
        failure.response = SimpleNamespace(status_code=status)
    hub(failure)
    with pytest.raises(UserError) as raised:
        tokenizers.main(["llama2", str(tmp_path), "--api_key", "hf_secret"])
    assert "secret" not in str(raised.value)
    assert ("accept its terms" in str(raised.value)) == (status is not None)


@pytest.mark.parametrize(
    "script, argv",
    [
        (tokenizers, ["llama3", "folder"]),
        (tokenizers, ["cl100k_base", "folder"]),
        (data, ["fineweb_edu", "1", "--data_dir", "folder"]),
    ],
)
def test_without_a_network_the_cause_comes_first(tmp_path, hub, monkeypatch, script, argv):
    stand_in = hub(ConnectionError("the library's own words"))
    stand_in.get_encoding = stand_in.dataset_info = lambda *_, **__: stand_in.hf_hub_download("")
    monkeypatch.setattr("lingua.prepare.network.find_obstacle", lambda url: "no route to host")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^no connection to [a-z.]+ \(no route to host\)"):
        script.main(argv)


def test_an_encoding_of_tiktoken_becomes_a_file_that_loads(tmp_path, monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256}
    small = tiktoken.Encoding("small", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: small)
    tokenizers.main(["cl100k_base", str(tmp_path)])
    tokenizer = build_tokenizer("tiktoken", str(tmp_path / "cl100k_base.tiktoken"))
    assert tokenizer.encode("th", add_bos=False, add_eos=False) == [256]


def test_a_missing_tiktoken_is_named_only_if_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="cl100k_base needs the package tiktoken: pip install"):
        tokenizers.main(["cl100k_base", str(tmp_path)])
    with pytest.raises(UserError, match="name=llama9 must be one of"):
        tokenizers.main(["llama9", str(tmp_path)])


def test_unknown_names_list_the_known_ones(tmp_path):
    for name in ("llama9", "o200k_base"):  # the latter has another split rule
        with pytest.raises(
            UserError, match=f"name={name} must be one of llama2, llama3, gemma, cl"
        ):
            tokenizers.main([name, str(tmp_path)])
