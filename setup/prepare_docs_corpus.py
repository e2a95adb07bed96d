"""Make a corpus of English from free documentation that package managers ship, without a hub.

    python setup/prepare_docs_corpus.py --out data/docs

downloads Debian packages of documentation by name with apt, to <out>_packages, and reads them
without installing anything. `--source_dir` reads packages or documents that are there already.

A document is a page of HTML, a man page, or a file of Info, reStructuredText, Markdown or text; a
longer one is cut at paragraphs after each 64 kB. Of each document the paragraphs of English prose
are kept (`lingua/prepare/prose.py`). A paragraph is dropped if more than half of a sample of its
runs of six words occurred before, in any package: exact and near repeats. Documents below 300
characters are dropped. The same packages give the same bytes. The folder is a source of data:

    docs.chunk.NN.jsonl   training documents, shuffled, with `text` and `id`
    docs.val.jsonl        documents held out by the hash of their text
    tokenizer.json        byte-level BPE, trained on the chunks
    manifest.json         versions, licences, sha256, bytes in and out of the packages
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lingua

from apps.LT2.scripts.prepare import how_to_train
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.prepare.corpus import GB, describe, file_errors
from lingua.prepare.markup import read_passages
from lingua.prepare.packages import (
    LICENCE_FILE,
    Package,
    download_debian,
    find_packages,
    licences_of,
)
from lingua.prepare.prose import is_repeat
from lingua.prepare.readers import LONG_TEXT, to_line
from lingua.prepare.shuffle import ShufflePlan, find_finished, shuffle_documents
from lingua.prepare.tokenizer import add_tokenizer, check_vocabulary

NAME = "docs"
MIN_DOCUMENT = 300  # characters
SAMPLE = 4  # one of so many runs of words is compared; all of them take 4 times the memory
# With at least 0.2 MB of prose in 0.01 GB; linux-doc and others only name the newest version's.
NAMES = (
    "apache2-doc autoconf-doc bash-doc bind9-doc borgbackup-doc cinder-doc clisp-doc cmake-doc "
    "debian-policy debian-reference-en developers-reference doxygen-doc dpdk-doc erlang-doc "
    "exim4-doc-html frr-doc gap-doc git-doc glance-doc gnuplot-doc guile-3.0-doc harden-doc "
    "heat-doc icinga2-doc ironic-doc jargon-text keystone-doc krb5-doc libboost-doc "
    "libglib2.0-doc libgtk-3-doc libreoffice-help-en-us linux-doc mame-doc manila-doc manpages "
    "manpages-dev maxima-doc neutron-doc nodejs-doc nova-doc octave-doc octavia-doc perl-doc "
    "postfix-doc postgis-doc postgresql-doc povray-doc python-celery-doc python-django-doc "
    "python-djangorestframework-doc python-ipython-doc python-pandas-doc python-sqlalchemy-doc "
    "python3-doc qtbase5-doc-html qtdeclarative5-doc-html racket-doc rt5-doc-html sbcl-doc "
    "shorewall-doc slurm-wlm-doc snd-doc sphinx-doc sqlite3-doc swi-prolog-doc swift-doc "
    "twisted-doc wireshark-doc zsh-doc"
)
PACKAGES = NAMES.split()
PYTHON_PACKAGES = ["Django", "docutils", "Sphinx"]  # whose source archives have much text
ADVICE = (
    "pass --source_dir FOLDER with .deb, .whl or .tar.gz files, or folders of HTML, man pages, "
    "reStructuredText, Markdown or text. Such files come from `apt-get download "
    f"{' '.join(PACKAGES[:3])} ...` on a Debian or Ubuntu machine, or from `pip download --no-deps "
    f"--no-binary :all: -d FOLDER {' '.join(PYTHON_PACKAGES)}`"
)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/docs"), help="output folder")
    add("--source_dir", type=Path, help="folder of .deb, .whl or .tar.gz files, or of documents")
    add("--packages", nargs="+", metavar="NAME", help="Debian packages (default: see PACKAGES)")
    add("--train_tokenizer", type=int, default=8192, metavar="N", help="tokens of the tokenizer")
    add(
        "--validation_documents",
        type=int,
        help="documents held out for the validation loss; 0: none (default: 5%%, at most 10,000)",
    )
    add("--nchunks", type=int, help="training files (default: 8, or 1 below 1,000 documents)")
    add("--seed", type=int, default=42, help="seed of the shuffle")
    given = parser.parse_args(argv)
    parser.require_positive(given, "nchunks")
    parser.require_at_least(0, given, "validation_documents")
    check_vocabulary("--train_tokenizer", given.train_tokenizer)
    if given.source_dir and given.packages:
        raise UserError("--packages and --source_dir: give only one of them")
    return given


def read_package(package: Package) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
    """Return what the manifest says of a package, and (name, passages) of its documents."""
    licences: set[str] = set()
    documents = []
    for name, content in package.members():
        if LICENCE_FILE.search(name):
            licences |= licences_of(name, content.decode("utf-8", "replace"))
        if found := read_passages(name, content):
            documents.append((name, found))
    facts = {
        "name": package.name,
        "version": package.version,
        "licences": sorted(licences) or ["unknown"],
        "sha256": package.sha256(),
        "bytes_in": package.size(),
    }
    return facts, sorted(documents)


def cut(passages: Sequence[str]) -> Iterator[str]:
    """Join passages to documents of about LONG_TEXT characters at most."""
    part: list[str] = []
    size = 0
    for passage in passages:
        part.append(passage)
        size += len(passage) + 2
        if size >= LONG_TEXT:
            yield "\n\n".join(part)
            part, size = [], 0
    yield "\n\n".join(part)


def write_texts(packages: Sequence[Package], folder: Path) -> list[dict[str, Any]]:
    """Write the documents of each package to a file in `folder`. Return the packages' facts.

    Repeats are dropped over all packages, before documents are held out for validation.
    """
    seen: set[int] = set()
    facts = []
    silent = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    # fork, as this file is no module that a new process could import
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), context, **silent) as pool:
        try:
            results = pool.map(read_package, packages)
            for number, (package, result) in enumerate(zip(packages, results, strict=True)):
                fact, documents = result
                n_bytes = n_documents = 0
                with open(folder / f"{number:04d}.jsonl", "wb") as file:
                    for name, passages in documents:
                        fresh = [p for p in passages if not is_repeat(p, seen, SAMPLE)]
                        for text in cut(fresh):
                            if len(text) >= MIN_DOCUMENT:
                                document = {"text": text, "id": f"{package.name}:{name}"}
                                file.write(to_line(document, b""))
                                n_bytes += len(text.encode())
                                n_documents += 1
                facts.append(fact | {"bytes_out": n_bytes, "documents": n_documents})
                print(f"{package.name} {package.version}: {n_bytes / 1e6:.2f} MB of prose")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return facts


def build(
    packages: Sequence[Package], out: Path, plan: ShufflePlan, request: dict[str, list[str]]
) -> dict[str, Any]:
    """Make the folder `out` from the packages, and return its manifest."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        texts = Path(name)
        facts = write_texts(packages, texts)
        if not any(fact["documents"] for fact in facts):
            raise UserError(
                f"no English prose in {', '.join(p.path.name for p in packages[:3])}: {ADVICE}"
            )
        entries = {"made_of": request, "packages": facts}
        files = sorted(file for file in texts.iterdir() if file.stat().st_size)
        return shuffle_documents(files, texts, out, plan, keep_unfinished=False, facts=entries)


def main(argv: Sequence[str]) -> None:
    given = parse_options(argv)
    out, source = given.out, given.source_dir
    plan = ShufflePlan(
        name=NAME,
        seed=given.seed,
        n_chunks=given.nchunks,
        n_validation=given.validation_documents,
        memory=2 * GB,
        by_text=True,
    )
    with file_errors():
        packages = find_packages(source) if source else []
        request: dict[str, list[str]] = {
            "source": sorted(f"{p.name} {p.sha256()}" for p in packages)
        }
        if not source:
            request = {"debian": sorted(given.packages or PACKAGES)}
        manifest = find_finished(out, plan)
        if manifest and manifest.get("made_of") != request:
            raise UserError(f"--out {out} was made of other packages; move it away")
        if manifest:
            print(f"{out}: complete, nothing to do")
        else:
            if not source:
                folder = out.with_name(f"{out.name}_packages")
                packages = download_debian(request["debian"], folder, ADVICE)
            manifest = build(packages, out, plan, request)
        add_tokenizer(out, given.train_tokenizer)
    print(f"{out}: {describe(manifest)}{how_to_train(out, NAME, True)}")


if __name__ == "__main__":
    run_cli(main)
