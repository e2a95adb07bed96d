"""Shuffle more documents than fit in memory, and write them as a source of training data.

    sources  ->  piles on disk      pile i of n gets the documents with keys from i/n to (i + 1)/n
    piles    ->  one order          each pile is sorted by key in memory
    order    ->  <name>.val.jsonl   the first `n_validation` documents, if that isn't 0
                 <name>.chunk.*     the rest, round-robin

A document's key is 64 random bits, computed from the seed, the source file's name and the position
in that file, or from the seed and the text. So every order is equally likely, and the order does
not depend on memory, on the number of piles or on interruptions.

Progress is saved between source files and after each pile, with the lengths of all files. A killed
run truncates the files to these lengths, resumes, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lingua.errors import UserError
from lingua.files.atomic import fsync_path, write_atomic
from lingua.files.lock import LOCK_NAME, lock_folders, make_writable
from lingua.prepare.readers import check_document_file, read_documents, to_line
from lingua.prepare.sources import estimate_text_bytes, unfinished

PROGRESS_NAME = "progress.json"
MANIFEST_NAME = "manifest.json"
MAX_PILES = 256  # open files
MEMORY_SHARE = 0.7  # of `memory`, for the lines of a pile; the rest is overhead
BUFFER = 2**16  # bytes of a file that is written
LINE_OVERHEAD = 64  # bytes of memory per line, apart from its text
KEY_BITS = 64
KEY_DIGITS = KEY_BITS // 4
LOG_EVERY = 10.0  # seconds
MANY_CHUNKS, MANY_DOCUMENTS = 8, 1000  # from so many documents on, there are so many chunks
VALIDATION_SHARE, MAX_VALIDATION = 0.05, 10_000  # of the documents; documents
SAVE_EVERY = 30.0  # seconds between saves in `scatter`: each one syncs hundreds of piles

Log = Callable[[str], None]


@dataclass(frozen=True)
class ShufflePlan:
    name: str  # prefix of the file names
    seed: int
    n_chunks: int | None  # None: 8, or 1 for fewer than 1,000 documents
    n_validation: int | None  # documents; 0: no validation file; None: 5%, at most 10,000
    memory: int  # bytes
    text_field: str | None = None  # None: text, or content if that is missing or null
    # order and hold out by the texts, so that a text's place does not depend on other documents
    by_text: bool = False

    @property
    def scattered(self) -> dict[str, Any]:
        """What determines the documents in the piles, apart from the sources."""
        # Folders of older versions have no text_field.
        given: dict[str, Any] = {"text_field": self.text_field} if self.text_field else {}
        given |= {"by_text": True} if self.by_text else {}
        return {"name": self.name, "seed": self.seed, **given}

    def request(self, documents: int) -> dict[str, Any]:
        """What determines the result for so many documents, apart from the sources."""
        n_chunks, n_validation = self.n_chunks, self.n_validation
        if n_chunks is None:
            n_chunks = MANY_CHUNKS if documents >= MANY_DOCUMENTS else 1
        if n_validation is None:
            share = max(int(documents * VALIDATION_SHARE), 1)
            n_validation = min(share, MAX_VALIDATION) if documents > 1 else 0
        return self.scattered | {"nchunks": n_chunks, "validation_documents": n_validation}


def shuffle_documents(
    sources: Sequence[Path],
    root: Path,
    out: Path,
    plan: ShufflePlan,
    log: Log = print,
    keep_unfinished: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Shuffle the files `sources` below `root` into the folder `out`; return its manifest.

    `facts`: further entries of the manifest.

    Works in `<out>.unfinished`, which one process holds at a time, and renames it at the end. A
    complete folder is left alone; UserError if it was made from something else.

    After an error or Ctrl-C, the next call resumes. Without `keep_unfinished`, it starts again:
    what this call wrote is removed, but not the work of an earlier call that was killed.
    """
    finished = find_finished(out, plan)
    if finished is not None:
        made = (out / MANIFEST_NAME).stat().st_mtime
        names = {name for name, _ in finished["sources"].items() ^ _sizes(sources, root).items()}
        names |= {str(file.relative_to(root)) for file in sources if file.stat().st_mtime > made}
        for name in sorted(names)[:1]:
            raise UserError(
                f"{out} was made from other source files: {name} is new or has changed; move {out} "
                "away"
            )
        log(f"{out}: complete, nothing to do")
        return finished
    work = unfinished(out)
    is_ours = not keep_unfinished and not work.exists()
    make_writable("output", work)
    with lock_folders({"output": work}), _removed_on_error(work if is_ours else None):
        manifest = _read_json(work / MANIFEST_NAME)
        if manifest is not None:  # killed before the rename
            _refuse_other(work, manifest["request"], plan.request(manifest["documents"]))
        else:
            shuffle = _Shuffle(work, plan, log)
            shuffle.scatter(sources, root)
            shuffle.write_chunks()
            manifest = shuffle.finish(facts or {})
        for left in [work / PROGRESS_NAME, work / LOCK_NAME, *work.glob(".*.tmp-*")]:
            left.unlink(missing_ok=True)
        fsync_path(work)
        os.replace(work, out)
        fsync_path(out.parent)
    return manifest


def find_finished(out: Path, plan: ShufflePlan) -> dict[str, Any] | None:
    """Return the manifest of a complete folder, or None if it does not exist or is empty.

    UserError if `plan` did not make it, or if a file is missing or has another length.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = _read_json(out / MANIFEST_NAME)
    if manifest is None:
        raise UserError(f"{out} exists and has no {MANIFEST_NAME}: choose another folder")
    request = plan.request(manifest["documents"])
    if manifest["request"] != request:
        made_with = _differences(manifest["request"], request)
        raise UserError(f"{out} was made with {made_with}; move it away")
    for name, facts in manifest["files"].items():
        length = (out / name).stat().st_size if (out / name).is_file() else None
        if length != facts["bytes"]:
            found = "missing" if length is None else f"{length} bytes long"
            raise UserError(
                f"{out / name} is {found} and was made with {facts['bytes']} bytes: restore it, or "
                f"move {out} away and run again"
            )
    return manifest


@contextmanager
def _removed_on_error(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _refuse_other(work: Path, started_with: dict[str, Any], now: dict[str, Any]) -> None:
    if started_with != now:
        differences = _differences(started_with, now)
        raise UserError(f"{work} was started with {differences}: remove it to start again")


def _sizes(sources: Sequence[Path], root: Path) -> dict[str, int]:
    return {file.relative_to(root).as_posix(): file.stat().st_size for file in sources}


class _Shuffle:
    """The work in the folder `work`; `progress` says how far it is."""

    def __init__(self, work: Path, plan: ShufflePlan, log: Log):
        self.work, self.plan, self.log = work, plan, log
        self.logged = self.saved = time.monotonic()
        self.budget = max(int(plan.memory * MEMORY_SHARE), 1)
        self.digests: list[str] = []  # sha256 of the outputs
        # The rest of the request matters when chunks are written.
        piled = plan.scattered
        self.progress: dict[str, Any] = _read_json(work / PROGRESS_NAME) or {
            "piled": piled,
            "n_piles": None,
            "sources": {},  # name -> size of the files that are in the piles
            "is_piled": False,
            "documents": 0,
            "without_text": 0,
            # "dealt" is the name of older versions, whose work can be resumed: written to chunks
            "dealing": None,  # the request, once chunks are being written
            "dealt": 0,  # piles
            "dealt_documents": 0,
            "lengths": {},  # of files, when this was written
        }
        _refuse_other(work, self.progress["piled"], piled)

    def scatter(self, sources: Sequence[Path], root: Path) -> None:
        """Write the documents of all source files into the piles."""
        progress = self.progress
        if progress["is_piled"]:
            self._check_sources(_sizes(sources, root))
            return
        for source in sources:  # find a broken parquet file before hours of work
            check_document_file(source, self.plan.text_field)
        self._check_sources(_sizes(sources[: len(progress["sources"])], root))
        if progress["n_piles"] is None:
            expected = sum(map(estimate_text_bytes, sources))
            progress["n_piles"] = min(_n_piles(expected, self.budget), MAX_PILES)
        piles = [self._pile(i) for i in range(progress["n_piles"])]
        with _Appended(piles, progress["lengths"]) as files:
            for source in sources[len(progress["sources"]) :]:
                name = source.relative_to(root).as_posix()
                for number, document in enumerate(read_documents(source, self.plan.text_field)):
                    if not document["text"]:
                        progress["without_text"] += 1
                        continue
                    place = document["text"] if self.plan.by_text else f"{name}/{number}"
                    key = _key(f"{self.plan.seed}/{place}")
                    files.write(key * len(piles) >> KEY_BITS, to_line(document, b"%016x" % key))
                    progress["documents"] += 1
                    self._log("{:,} documents read, now {}", progress["documents"], name)
                progress["sources"][name] = source.stat().st_size
                if time.monotonic() - self.saved >= SAVE_EVERY:
                    self._save(files.lengths())
            progress["is_piled"] = True
            self._save(files.lengths())

    def _check_sources(self, now: dict[str, int]) -> None:
        """Check that files in the piles have not changed; later files may have been repaired."""
        for name, _ in sorted(now.items() ^ self.progress["sources"].items())[:1]:
            raise UserError(
                f"{self.work} was started with other source files: {name} is new or has changed; "
                "restore it, or remove the folder to start again"
            )

    def write_chunks(self) -> None:
        """Sort each pile by key and write its documents to the validation file and the chunks."""
        progress = self.progress
        request = self.plan.request(progress["documents"])
        n_chunks, n_validation = request["nchunks"], request["validation_documents"]
        if progress["documents"] == 0:
            raise UserError(f"no document with text in {', '.join(list(progress['sources'])[:3])}")
        if progress["documents"] < n_validation + n_chunks:
            raise UserError(
                f"{progress['documents']} documents with text are too few for --nchunks "
                f"{n_chunks} and --validation_documents {n_validation}; lower one"
            )
        _refuse_other(self.work, progress["dealing"] or request, request)
        if progress["dealing"] is None:
            progress["dealing"] = request
            self._save(progress["lengths"])
        outputs = [self.work / name for name in self._outputs()]
        first_chunk = len(outputs) - n_chunks
        for i in range(progress["dealt"]):  # in case a run was killed before removing them
            self._pile(i).unlink(missing_ok=True)
        with _Appended(outputs, progress["lengths"]) as files:
            digests = [hashlib.sha256(b"") for _ in outputs]
            for digest, path in zip(digests, outputs if progress["dealt"] else [], strict=False):
                with open(path, "rb") as file:  # what an interrupted run wrote
                    hashlib.file_digest(file, lambda digest=digest: digest)
            for i in range(progress["dealt"], progress["n_piles"]):
                n_written = progress["dealt_documents"]
                for line in _sorted_lines(self._pile(i), self.budget, progress["n_piles"]):
                    number = n_written - n_validation  # of a training document
                    output = 0 if number < 0 else first_chunk + number % n_chunks
                    files.write(output, line)
                    digests[output].update(line)
                    n_written += 1
                    self._log("{:,} of {:,} documents written", n_written, progress["documents"])
                progress["dealt"], progress["dealt_documents"] = i + 1, n_written
                self._save(files.lengths())
                self._pile(i).unlink()  # after the save: a resumed run doesn't need it
            self.digests = [digest.hexdigest() for digest in digests]

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, which marks the folder as complete."""
        progress = self.progress
        assert progress["dealt_documents"] == progress["documents"], "documents were lost"
        files = {}
        for (name, n), digest in zip(self._outputs().items(), self.digests, strict=True):
            size = (self.work / name).stat().st_size
            files[name] = {"documents": n, "bytes": size, "sha256": digest}
        manifest = {
            "request": self.plan.request(progress["documents"]),
            "documents": progress["documents"],
            "without_text": progress["without_text"],
            "files": files,
            "sources": progress["sources"],
            **facts,
        }
        shutil.rmtree(self.work / "piles", ignore_errors=True)
        write_atomic(self.work / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
        return manifest

    def _outputs(self) -> dict[str, int]:
        """Return file -> number of documents: the validation file, if any, then the chunks."""
        request, name = self.plan.request(self.progress["documents"]), self.plan.name
        n_chunks, n_validation = request["nchunks"], request["validation_documents"]
        n_digits = max(len(str(n_chunks - 1)), 2)
        whole, rest = divmod(self.progress["documents"] - n_validation, n_chunks)
        validation = {f"{name}.val.jsonl": n_validation} if n_validation else {}
        return validation | {
            f"{name}.chunk.{i:0{n_digits}d}.jsonl": whole + (i < rest) for i in range(n_chunks)
        }

    def _pile(self, i: int) -> Path:
        return self.work / "piles" / f"{i:03d}.jsonl"

    def _save(self, lengths: dict[str, int]) -> None:
        self.progress["lengths"] = lengths
        write_atomic(self.work / PROGRESS_NAME, json.dumps(self.progress))
        self.saved = time.monotonic()

    def _log(self, message: str, *values: Any) -> None:
        now = time.monotonic()
        if now - self.logged > LOG_EVERY:
            self.logged = now
            self.log(message.format(*values))


class _Appended(ExitStack):
    """Files to append to, first truncated to their known lengths."""

    def __init__(self, paths: Sequence[Path], lengths: dict[str, int]):
        super().__init__()
        self.files: list[BinaryIO] = []
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            file = self.enter_context(open(path, "ab", BUFFER))  # noqa: SIM115 (closed by the stack)
            length = lengths.get(path.name, 0)
            if file.tell() < length:
                raise UserError(f"{path} has lost data: remove {path.parent} to start again")
            file.truncate(length)
            self.files.append(file)

    def write(self, number: int, line: bytes) -> None:
        self.files[number].write(line)

    def lengths(self) -> dict[str, int]:
        """Return the lengths by name, with everything on disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        return {Path(file.name).name: file.tell() for file in self.files}


def _n_piles(n_bytes: int, budget: int) -> int:
    return max(-(-n_bytes // budget), 1)


def _key(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=KEY_BITS // 8)
    return int.from_bytes(digest.digest(), "big")


def _sorted_lines(pile: Path, budget: int, scale: int) -> Iterator[bytes]:
    """Yield the lines of a pile sorted by key, without the key, in `budget` bytes of memory.

    A larger pile is split into piles. `scale` is the product of the numbers of piles so far: the
    keys of this pile cover 1 / scale of all keys.
    """
    lines: list[bytes] = []
    held = 0
    with open(pile, "rb") as file:
        for line in file:
            held += len(line) + LINE_OVERHEAD
            if held > budget and lines:  # a single line may be longer than the budget
                break
            lines.append(line)
        else:
            lines.sort()
            yield from (line[KEY_DIGITS:] for line in lines)
            return
    del lines, line
    n_parts = min(_n_piles(pile.stat().st_size, budget) + 1, MAX_PILES)
    parts = [pile.with_suffix(f".{i:03d}.jsonl") for i in range(n_parts)]
    with _Appended(parts, {}) as files, open(pile, "rb") as file:
        for line in file:
            rest = int(line[:KEY_DIGITS], 16) * scale % 2**KEY_BITS  # as a part of this pile's keys
            files.write(rest * n_parts >> KEY_BITS, line)
    for part in parts:
        yield from _sorted_lines(part, budget, scale * n_parts)
        part.unlink()


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{file} is damaged: remove {file.parent} and run again") from None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the options of the old request that differ from the new one."""
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}={old.get(key)}" for key in keys)
