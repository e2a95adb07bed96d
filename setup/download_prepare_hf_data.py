"""Download a corpus from Hugging Face, shuffle it, and split it into chunks for training.

    python setup/download_prepare_hf_data.py fineweb_edu 64 --data_dir ./data --seed 42 --nchunks 32

makes ./data/fineweb_edu_shuffled, a folder for `data.sources`, in 64 GB of memory:

    fineweb_edu.chunk.00.jsonl ...   training documents, one JSON object per line
    fineweb_edu.val.jsonl            held-out documents, if --validation_documents isn't 0
    manifest.json                    documents, bytes and sha256 of each file

If it is interrupted, the same command resumes and ends with the same bytes. They depend on the
seed, not on the memory. With --source_dir the documents come from files on disk, as in
`python -m apps.LT2.scripts.prepare`, and nothing is downloaded. Downloads stay in
<data_dir>/<dataset> and can be removed at the end. The disk must hold them, and the text twice.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lingua

from lingua.config.cli import OneLineParser
from lingua.errors import UserError, first_line, import_optional, run_cli
from lingua.files.atomic import write_atomic
from lingua.prepare.corpus import describe, file_errors, memory_bytes, prepare_corpus
from lingua.prepare.network import HUB, call_online
from lingua.prepare.shuffle import MAX_VALIDATION, ShufflePlan, find_finished
from lingua.prepare.splits import ALL


@dataclass(frozen=True)
class Corpus:
    repo_id: str  # on Hugging Face
    patterns: tuple[str, ...]  # of its files


CORPORA = {
    "fineweb_edu": Corpus("HuggingFaceFW/fineweb-edu", ("data/*/*.parquet",)),
    "fineweb_edu_10bt": Corpus("HuggingFaceFW/fineweb-edu", ("sample/10BT/*.parquet",)),
    "dclm_baseline_1.0": Corpus("mlfoundations/dclm-baseline-1.0", ("*.jsonl.zst",)),
    "dclm_baseline_1.0_10prct": Corpus(
        "mlfoundations/dclm-baseline-1.0", ("global-shard_01_of_10/*.jsonl.zst",)
    ),
}


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    corpora = ", ".join(sorted(CORPORA))
    add("dataset", help=f"{corpora}, or any name with --source_dir; it also names the files")
    add("memory", type=float, help="GB of memory to shuffle in")
    add("--data_dir", type=Path, default=Path("data"), help="output folder")
    add("--seed", type=int, default=42, help="seed of the shuffle")
    add("--nchunks", type=int, default=32, help="training files: 1, or the number of GPUs")
    add(
        "--validation_documents",
        type=int,
        help="documents held out for the validation loss; 0: no validation file (default: 10,000; "
        "of --source_dir 5%%, at most 10,000)",
    )
    add("--source_dir", type=Path, help="read the files of this folder instead of downloading")
    add("--text_field", help="field of the text in --source_dir (default: text, else content)")
    add("--split", default="train", help=f"split of --source_dir to read: train, test, ..., {ALL}")
    given = parser.parse_args(argv)
    memory_bytes(given.memory, "memory")
    parser.require_positive(given, "nchunks")
    parser.require_at_least(0, given, "validation_documents")
    if given.source_dir is None and given.dataset not in CORPORA:
        raise UserError(
            f"dataset {given.dataset!r} must be one of {corpora}, or have --source_dir FOLDER"
        )
    if given.source_dir is None and given.split != "train":
        raise UserError(f"--split {given.split} needs --source_dir; downloads only have train")
    if given.source_dir is None and given.text_field:
        raise UserError("--text_field needs --source_dir; downloads have text")
    if not re.fullmatch(r"\w[\w.-]*", given.dataset):
        raise UserError(f"dataset {given.dataset!r} must be letters, digits, '_', '.' or '-'")
    return given


def download(dataset: str, folder: Path) -> None:
    """Download all files of the corpus into `folder`, except files that are already there.

    All files are from one commit, chosen at the start and kept in `download.json`: the corpus may
    change while it downloads. Once everything is there, the hub is not asked again.
    """
    corpus, record_file = CORPORA[dataset], folder / "download.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    if record.get("files") and find_incomplete(record["files"], folder) is None:
        return
    hub = import_optional("huggingface_hub", extra="data", needed_by=f"downloading {dataset}")
    try:
        ask = partial(
            hub.HfApi().dataset_info,
            corpus.repo_id,
            revision=record.get("revision"),
            files_metadata=True,
        )
        info = call_online(ask, HUB, dataset)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"repo_id": corpus.repo_id, "revision": info.sha}
        write_atomic(record_file, json.dumps(record))
        hub.snapshot_download(
            corpus.repo_id,
            repo_type="dataset",
            revision=info.sha,
            local_dir=folder,
            allow_patterns=list(corpus.patterns),
        )
        files = wanted_files(corpus, info.siblings)
        if problem := find_incomplete(files, folder):
            raise UserError(
                f"{problem}; run the same command again to resume (remove a file that is too long "
                "first)"
            )
    except UserError:
        raise
    except Exception as error:  # from the hub, its HTTP library, the network or the disk
        raise UserError(
            f"{dataset} could not be downloaded from {corpus.repo_id}: {first_line(error)}; run "
            "the same command again to resume, or give --source_dir"
        ) from None
    write_atomic(record_file, json.dumps({**record, "files": files}))


def wanted_files(corpus: Corpus, siblings: Sequence[Any]) -> dict[str, int]:
    """Return name -> bytes of the corpus's files in its repository."""
    files = {
        file.rfilename: file.size
        for file in siblings
        if any(fnmatchcase(file.rfilename, pattern) for pattern in corpus.patterns)
    }
    if not files:
        raise UserError(f"{corpus.repo_id} has no file named {', '.join(corpus.patterns)}")
    return files


def find_incomplete(files: Mapping[str, int], folder: Path) -> str | None:
    """Describe the first incomplete file, if any.

    Without a network the hub's client succeeds if the folder has any file.
    """
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            return f"{path} is incomplete: {found} of {size} bytes"
    return None


def main(argv: Sequence[str]) -> None:
    given = parse_options(argv)
    n_validation = given.validation_documents
    if n_validation is None and given.source_dir is None:
        n_validation = MAX_VALIDATION
    plan = ShufflePlan(
        name=given.dataset,
        seed=given.seed,
        n_chunks=given.nchunks,
        n_validation=n_validation,
        memory=memory_bytes(given.memory, "memory"),
        text_field=given.text_field,
    )
    out = given.data_dir / f"{given.dataset}_shuffled"
    with file_errors():
        if given.source_dir is not None:
            manifest = prepare_corpus(given.source_dir, out, plan, split=given.split)
        elif (manifest := find_finished(out, plan)) is None:
            download(given.dataset, given.data_dir / given.dataset)
            manifest = prepare_corpus(given.data_dir / given.dataset, out, plan)
    print(f"{out}: {describe(manifest)}")


if __name__ == "__main__":
    run_cli(main)
