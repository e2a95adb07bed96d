"""Download a corpus from Hugging Face, shuffle it, and deal it into chunks to train on.

    python setup/download_prepare_hf_data.py fineweb_edu 64 --data_dir ./data --seed 42 --nchunks 32

makes ./data/fineweb_edu_shuffled, a folder for `data.sources`, within 64 GB of memory:

    fineweb_edu.chunk.00.jsonl ...   training documents, one JSON object a line
    fineweb_edu.val.jsonl            documents that no chunk has, if --validation_documents isn't 0
    manifest.json                    documents, bytes and sha256 of each file

Killed at any moment, the same command goes on where it was and ends with the same bytes, which
depend on the seed and not on the memory. With --source_dir the documents come from files on disk
(parquet, or JSON lines as they are or in .gz or .zst), and nothing is downloaded. Downloads stay in
<data_dir>/<dataset> and may be removed when all is done. The disk must hold them, and the text
twice.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where this checkout's lingua lies

from lingua.config.cli import OneLineParser
from lingua.errors import UserError, first_line, import_optional, run_cli
from lingua.files.atomic import write_atomic
from lingua.prepare.shuffle import ShufflePlan, find_finished, shuffle_documents
from lingua.prepare.sources import describe_passed_over, find_document_files

GB = 10**9
MIN_MEMORY = 0.01  # GB


@dataclass(frozen=True)
class Corpus:
    repo_id: str  # on Hugging Face
    patterns: tuple[str, ...]  # of the files in it


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
    add("dataset", help=f"{corpora}, or any name with --source_dir; names the files, too")
    add("memory", type=float, help="GB of memory to shuffle in")
    add("--data_dir", type=Path, default=Path("data"), help="where all of it goes")
    add("--seed", type=int, default=42, help="of the shuffle")
    add("--nchunks", type=int, default=32, help="training files: 1, or the number of GPUs")
    add(
        "--validation_documents",
        type=int,
        default=10_000,
        help="documents held out for the validation loss; 0: none, and no file of them",
    )
    add("--source_dir", type=Path, help="read the files of this folder; download nothing")
    given = parser.parse_args(argv)
    if not MIN_MEMORY <= given.memory < float("inf"):
        raise UserError(f"memory={given.memory}: give {MIN_MEMORY} GB at least")
    parser.require_positive(given, "nchunks")
    parser.require_at_least(0, given, "validation_documents")
    if given.source_dir is None and given.dataset not in CORPORA:
        raise UserError(
            f"dataset {given.dataset!r} is none of {corpora}; your own needs --source_dir FOLDER"
        )
    if not re.fullmatch(r"\w[\w.-]*", given.dataset):
        raise UserError(f"dataset {given.dataset!r} names a folder: letters, digits, '_', '.', '-'")
    return given


def download(dataset: str, folder: Path) -> None:
    """All files of the corpus into `folder`; those that are there are not fetched again.

    They are of one commit, chosen at the start and kept in `download.json`, whatever happens to the
    corpus in the days that it takes. While all that arrived is there the hub is not asked again.
    """
    corpus, record_file = CORPORA[dataset], folder / "download.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    if record.get("files") and find_incomplete(record["files"], folder) is None:
        return
    hub = import_optional("huggingface_hub", extra="data", needed_by=f"downloading {dataset}")
    try:
        info = hub.HfApi().dataset_info(
            corpus.repo_id, revision=record.get("revision"), files_metadata=True
        )
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
                f"{problem}; run the same command again to go on (a file that is too long must be "
                "removed first)"
            )
    except UserError:
        raise
    except Exception as error:  # of the hub, of its HTTP library, of the network, of the disk
        raise UserError(
            f"{dataset} could not be downloaded from {corpus.repo_id}: {first_line(error)}; run "
            "the same command again to go on, or give --source_dir"
        ) from None
    write_atomic(record_file, json.dumps({**record, "files": files}))


def wanted_files(corpus: Corpus, siblings: Sequence[Any]) -> dict[str, int]:
    """Name -> bytes of the corpus's files in its repository."""
    files = {
        file.rfilename: file.size
        for file in siblings
        if any(fnmatchcase(file.rfilename, pattern) for pattern in corpus.patterns)
    }
    if not files:
        raise UserError(f"{corpus.repo_id} has no file named {', '.join(corpus.patterns)}")
    return files


def find_incomplete(files: Mapping[str, int], folder: Path) -> str | None:
    """The first that is not whole. Without a network the hub's client returns in peace if the
    folder has files, and one that was broken may have been removed."""
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            return f"{path} is not whole: {found} of {size} bytes"
    return None


def main(argv: Sequence[str]) -> None:
    given = parse_options(argv)
    plan = ShufflePlan(
        name=given.dataset,
        seed=given.seed,
        n_chunks=given.nchunks,
        n_validation=given.validation_documents,
        memory=int(given.memory * GB),
    )
    out = given.data_dir / f"{given.dataset}_shuffled"
    try:
        manifest = None if given.source_dir else find_finished(out, plan)
        if manifest is None:
            root = given.source_dir or given.data_dir / given.dataset
            if given.source_dir is None:
                download(given.dataset, root)
            sources = find_document_files(root)
            if given.source_dir and (passed_over := describe_passed_over(root)):
                print(passed_over)
            manifest = shuffle_documents(sources, root, out, plan)
    except OSError as error:
        raise UserError(f"{error}; mend it and run the same command again, which goes on") from None
    print(f"{out}: {describe(manifest)}")


def describe(manifest: Mapping[str, Any]) -> str:
    """What was made, in a line."""
    n_chunks = manifest["request"]["nchunks"]
    n_validation = manifest["request"]["validation_documents"]
    size = format_bytes(sum(facts["bytes"] for facts in manifest["files"].values()))
    held_out = f" and a validation file of {n_validation:,} documents" if n_validation else ""
    left_out = manifest["without_text"]
    return f"{manifest['documents']:,} documents, {size}, in {n_chunks} chunks{held_out}" + (
        f"; {left_out:,} without text were left out" if left_out else ""
    )


def format_bytes(n: int) -> str:
    for unit, size in (("GB", GB), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


if __name__ == "__main__":
    run_cli(main)
