"""Make a small corpus of English from this Python's standard library, without a network.

    python setup/prepare_local_data.py --out ./data/local --nchunks 4

The text comes from the topics of `help()` (`pydoc_data/topics.py`) and from the docstrings and
comments of all library modules; nothing is imported or executed. Code, tables and signatures are
filtered out and repeated passages are kept once, which leaves about 2 MB. A document is a module or
a topic. The output folder is a source for the data loader:

    <name>.chunk.NN.jsonl   training documents, shuffled, in chunks of about equal size
    <name>.val.jsonl        documents held out for validation
    tokenizer.json          byte-level BPE of --vocab-size tokens, trained on the chunks
    manifest.json           counts and sha256 of the other files; written last

The same Python gives the same bytes on every run. A complete folder is left alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's lingua

from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.files.atomic import write_atomic
from lingua.prepare.corpus import file_errors
from lingua.prepare.prose import is_repeat, passages
from lingua.prepare.tokenizer import check_vocabulary, train_tokenizer

FORMAT = 1  # increase it if the same input gives other bytes, to rebuild older folders
SHUFFLE_SEED = 1234
VAL_SHARE = 0.05  # of all characters

SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
SKIPPED_DIRS |= {"test", "tests", "idle_test"}  # some distributions ship no tests
MIN_DOCUMENT = 200  # characters

COMMENT = re.compile(r"^(\s*)#(?!!) ?(.*)$")


# Text: from source files to passages of prose


def nodes_of_lines(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield what ast.walk does, but nothing inside a node of one line, which saves a third.

    No docstring and no string of several lines is there.
    """
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        yield node
        if getattr(node, "lineno", 0) != getattr(node, "end_lineno", None):
            nodes.extend(ast.iter_child_nodes(node))


def docstrings(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each docstring in a module."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in nodes:
        if isinstance(node, owners) and (text := ast.get_docstring(node, clean=False)):
            yield node.body[0].lineno, inspect.cleandoc(text)


def comments(source: str, nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each block of whole-line comments."""
    inside_string: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.end_lineno:
            inside_string.update(range(node.lineno + 1, node.end_lineno + 1))
    block: list[str] = []
    indent = None
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        match = COMMENT.match(line) if number not in inside_string else None
        if block and (match is None or match[1] != indent):
            yield number - len(block), "\n".join(block)
            block = []
        if match:
            indent = match[1]
            block.append(match[2])


def read_module(path: Path) -> tuple[str, ast.Module] | None:
    """Return source and syntax tree, or None if the file is not Python 3 in UTF-8."""
    try:
        source = path.read_text(encoding="utf-8")
        return source, ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None


def module_passages(path: Path) -> list[str]:
    """Return the docstrings and comments of a module in file order."""
    parsed = read_module(path)
    if parsed is None:
        return []
    source, tree = parsed
    nodes = list(nodes_of_lines(tree))
    texts = sorted([*docstrings(nodes), *comments(source, nodes)])
    return [passage for _, text in texts for passage in passages(text)]


def topic_passages(path: Path) -> dict[str, list[str]]:
    """Return the topics of `help()`, from the dict literal in pydoc_data/topics.py."""
    parsed = read_module(path) if path.exists() else None
    for node in parsed[1].body if parsed else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return {name: list(passages(text)) for name, text in sorted(topics.items())}
    return {}


def library_modules(stdlib: Path) -> list[Path]:
    """Return the library's modules, relative to `stdlib`, in a fixed order.

    Installed packages are not searched: they may have more files than the library.
    """
    found = []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = set(subfolders) - SKIPPED_DIRS
        # names such as _sysconfigdata__linux_x86_64-linux-gnu.py differ between machines
        names = [n for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
        found += [Path(folder, name).relative_to(stdlib) for name in names]
    return sorted(found, key=Path.as_posix)


def collect_documents(stdlib: Path) -> list[dict[str, str]]:
    """Return a document for each topic and module with enough prose, in a fixed order.

    Repeats are dropped in the whole corpus before documents are held out, so validation text does
    not recur in training, even with a word changed.
    """
    found = {
        f"topic:{name}": texts
        for name, texts in topic_passages(stdlib / "pydoc_data" / "topics.py").items()
    }
    for module in library_modules(stdlib):
        name = ".".join(module.with_suffix("").parts)
        found[f"module:{name}"] = module_passages(stdlib / module)

    seen: set[str] = set()
    documents = []
    for source, texts in found.items():
        text = "\n\n".join(passage for passage in texts if not is_repeat(passage, seen))
        if len(text) >= MIN_DOCUMENT:
            documents.append({"source": source, "text": text})
    return documents


# Files: from documents to a folder that the data loader reads


def hold_out(documents: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Shuffle, then split into (training, validation) documents."""
    documents = documents.copy()
    random.Random(SHUFFLE_SEED).shuffle(documents)
    total = sum(len(document["text"]) for document in documents)
    wanted = VAL_SHARE * total
    # One long document must not dominate the validation set.
    longest = max(wanted / 4, total / len(documents))
    train, val, held = [], [], 0
    for document in documents:
        if held < wanted and len(document["text"]) <= longest:
            val.append(document)
            held += len(document["text"])
        else:
            train.append(document)
    return train, val


def split_evenly(documents: list[dict[str, str]], nchunks: int) -> list[list[dict[str, str]]]:
    """Split into chunks of about equal size: longest document first, to the lightest chunk."""
    chunks: list[list[int]] = [[] for _ in range(nchunks)]
    sizes = [0] * nchunks
    by_length = sorted(range(len(documents)), key=lambda i: (-len(documents[i]["text"]), i))
    for i in by_length:
        lightest = sizes.index(min(sizes))
        chunks[lightest].append(i)
        sizes[lightest] += len(documents[i]["text"])
    return [[documents[i] for i in sorted(chunk)] for chunk in chunks]  # back in shuffled order


def to_jsonl(documents: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_manifest(out: Path) -> dict:
    try:
        return json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_complete(out: Path, request: dict) -> bool:
    """Return whether `out` has everything that `request` asks for, undamaged.

    UserError if another program made the folder: its files are not ours to delete.
    """
    manifest = read_manifest(out)
    if manifest and manifest.get("request", {}).keys() != request.keys():
        raise UserError(f"--out {out}: its manifest.json describes other data; give another folder")
    return manifest.get("request") == request and all(
        (out / name).is_file() and sha256((out / name).read_bytes()) == facts["sha256"]
        for name, facts in manifest["files"].items()
    )


def build(documents: list[dict[str, str]], request: dict) -> tuple[dict[str, bytes], dict]:
    """Return the files to write, and their manifest."""
    train, val = hold_out(documents)
    parts = {f"{request['name']}.val.jsonl": val}
    for i, chunk in enumerate(split_evenly(train, request["nchunks"])):
        parts[f"{request['name']}.chunk.{i:02d}.jsonl"] = chunk
    files = {name: to_jsonl(part) for name, part in parts.items()}
    files["tokenizer.json"] = train_tokenizer(
        (document["text"] for document in train), request["vocab_size"]
    )
    facts = {
        name: {"bytes": len(content), "sha256": sha256(content)} for name, content in files.items()
    }
    for name, part in parts.items():
        facts[name]["documents"] = len(part)
    return files, {"request": request, "python": platform.python_version(), "files": facts}


def publish(out: Path, files: dict[str, bytes], manifest: dict) -> None:
    """Write `files` into `out`. The old manifest is removed first, the new one written last."""
    out.mkdir(parents=True, exist_ok=True)
    stale = set(read_manifest(out).get("files", {})) - set(files)
    (out / "manifest.json").unlink(missing_ok=True)
    for name in sorted(stale):
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomic(out / name, content)
    write_atomic(out / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/local"), help="output folder")
    parser.add_argument("--name", default="stdlib", help="prefix of the file names")
    parser.add_argument(
        "--nchunks", type=int, default=4, help="training files, 1 to 100: at least one per GPU"
    )
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens of the tokenizer")
    given = parser.parse_args(argv)
    if not 1 <= given.nchunks <= 100:
        raise UserError(f"--nchunks must be 1 to 100, got {given.nchunks}")
    check_vocabulary("--vocab-size", given.vocab_size)
    if not re.fullmatch(r"[\w-]+", given.name):
        raise UserError(f"--name must be letters, digits, '_' or '-', got {given.name!r}")
    return given


def main(argv: Sequence[str], stdlib: Path | None = None) -> None:
    given = parse_options(argv)
    request = {
        "format": FORMAT,
        "name": given.name,
        "nchunks": given.nchunks,
        "vocab_size": given.vocab_size,
    }
    if is_complete(given.out, request):
        print(f"{given.out}: complete, nothing to do")
        return

    started = time.perf_counter()
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    documents = collect_documents(stdlib)
    if len(documents) <= given.nchunks:
        raise UserError(
            f"{stdlib}: found prose for {len(documents)} documents, too few for --nchunks "
            f"{given.nchunks}; this needs a Python that ships its library as .py files"
        )
    files, manifest = build(documents, request)
    with file_errors(f"--out {given.out}: "):
        publish(given.out, files, manifest)
    total = sum(len(content) for name, content in files.items() if name.endswith(".jsonl"))
    print(
        f"{given.out}: {len(documents)} documents, {total / 1e6:.2f} MB of text in {given.nchunks} "
        f"chunks and a validation file, {time.perf_counter() - started:.1f} s"
    )


if __name__ == "__main__":
    run_cli(main)
