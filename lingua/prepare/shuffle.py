"""Shuffle more documents than memory holds, and deal them into a source of training data.

    sources  ->  piles on disk      each document by its key, pile i of n from i/n of the keys on
    piles    ->  one order          each pile is sorted in memory, and they follow each other
    order    ->  <name>.val.jsonl   the first `n_validation` documents, where that is not 0,
                 <name>.chunk.*     and the others in turn: chunks differ by a document at most

A key is 64 random bits that follow from the seed, the name of the source file and the place in it.
So every order is as likely as any other, and which one it is does not depend on the memory, on the
number of piles, or on an interruption.

What is done is written down now and then between source files, and after each pile, with the
lengths that the files had then. A run that was killed cuts its files back to them and goes on, to
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lingua.errors import UserError
from lingua.files.atomic import fsync_path, write_atomic
from lingua.files.lock import LOCK_NAME, lock_folders, make_writable
from lingua.prepare.sources import check_document_file, estimate_text_bytes, read_documents

PROGRESS_NAME = "progress.json"
MANIFEST_NAME = "manifest.json"
MAX_PILES = 256  # files that are open at a time
MEMORY_SHARE = 0.7  # of the memory that is given, for the lines of a pile; the rest is overhead
LINE_OVERHEAD = 64  # bytes in memory that a line takes beside its own
KEY_BITS = 64
KEY_DIGITS = KEY_BITS // 4
TELL_EVERY = 10.0  # seconds
SAVE_EVERY = 30.0  # seconds, between source files: hundreds of piles must reach the disk

Tell = Callable[[str], None]


@dataclass(frozen=True)
class ShufflePlan:
    name: str  # start of the names of the files
    seed: int
    n_chunks: int
    n_validation: int  # documents; with 0 there is no such file
    memory: int  # bytes

    @property
    def request(self) -> dict[str, Any]:
        """What the result follows from, beside the sources."""
        return {
            "name": self.name,
            "seed": self.seed,
            "nchunks": self.n_chunks,
            "validation_documents": self.n_validation,
        }


def shuffle_documents(
    sources: Sequence[Path], root: Path, out: Path, plan: ShufflePlan, tell: Tell = print
) -> dict[str, Any]:
    """Make the folder `out`, a source for `data.sources`, of files below `root`; its manifest.

    `out` appears when all of it is there; until then the work lies in `<out>.unfinished`, which one
    process holds at a time. A folder that is complete is left alone, and one that was made of
    something else is a UserError.
    """
    finished = find_finished(out, plan)
    if finished is not None:
        if finished["sources"] != _sizes(sources, root):
            raise UserError(f"{out} was made with other source files; move it away")
        tell(f"{out}: complete, nothing to do")
        return finished
    work = out.with_name(f"{out.name}.unfinished")
    make_writable("--data_dir", work)
    with lock_folders({"--data_dir": work}):
        manifest = _read_json(work / MANIFEST_NAME)
        if manifest is not None:  # killed before it was renamed
            _refuse_other(work, manifest["request"], plan.request)
        else:
            shuffle = _Shuffle(work, plan, tell)
            shuffle.scatter(sources, root)
            shuffle.deal()
            manifest = shuffle.finish()
        for left in [work / PROGRESS_NAME, work / LOCK_NAME, *work.glob(".*.tmp-*")]:
            left.unlink(missing_ok=True)
        fsync_path(work)
        os.replace(work, out)
        fsync_path(out.parent)
    return manifest


def find_finished(out: Path, plan: ShufflePlan) -> dict[str, Any] | None:
    """The manifest of a complete folder; refused where it was not made by `plan`, or is damaged.

    That it is whole is seen by the lengths of its files.
    """
    if not out.exists():
        return None
    manifest = _read_json(out / MANIFEST_NAME)
    if manifest is None:
        raise UserError(f"{out} exists and has no {MANIFEST_NAME}: move it away")
    if manifest["request"] != plan.request:
        made_with = _differences(manifest["request"], plan.request)
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


def _refuse_other(work: Path, begun_with: dict[str, Any], now: dict[str, Any]) -> None:
    if begun_with != now:
        told = _differences(begun_with, now)
        raise UserError(f"{work} was begun with {told}: remove it to begin anew")


def _sizes(sources: Sequence[Path], root: Path) -> dict[str, int]:
    return {file.relative_to(root).as_posix(): file.stat().st_size for file in sources}


class _Shuffle:
    """The work in a folder, as far as `progress` says."""

    def __init__(self, work: Path, plan: ShufflePlan, tell: Tell):
        self.work, self.plan, self.tell = work, plan, tell
        self.told = self.saved = time.monotonic()
        # what the piles follow from; the rest of the request counts when they are dealt
        piled = {"name": plan.name, "seed": plan.seed}
        self.progress: dict[str, Any] = _read_json(work / PROGRESS_NAME) or {
            "piled": piled,
            "n_piles": None,
            "sources": {},  # those that are in the piles, with their sizes
            "is_piled": False,
            "documents": 0,
            "without_text": 0,
            "dealing": None,  # the request, once that has begun
            "dealt": 0,  # piles
            "dealt_documents": 0,
            "lengths": {},  # of files, when this was written
        }
        _refuse_other(work, self.progress["piled"], piled)

    def scatter(self, sources: Sequence[Path], root: Path) -> None:
        """Every source file into the piles."""
        progress = self.progress
        if progress["is_piled"]:
            self._check_sources(_sizes(sources, root))
            return
        # the ends of all parquet files first: a broken one is told before hours of work
        for source in sources:
            check_document_file(source)
        self._check_sources(_sizes(sources[: len(progress["sources"])], root))
        if progress["n_piles"] is None:
            expected = sum(map(estimate_text_bytes, sources))
            progress["n_piles"] = min(_n_piles(expected, self._budget), MAX_PILES)
        piles = [self._pile(i) for i in range(progress["n_piles"])]
        with _Appended(piles, progress["lengths"]) as files:
            for source in sources[len(progress["sources"]) :]:
                name = source.relative_to(root).as_posix()
                for place, document in enumerate(read_documents(source)):
                    if not document["text"]:
                        progress["without_text"] += 1
                        continue
                    key = _key(f"{self.plan.seed}/{name}/{place}")
                    files.write(key * len(piles) >> KEY_BITS, _keyed(key, _to_line(document)))
                    progress["documents"] += 1
                    self._tell("{:,} documents read, now {}", progress["documents"], name)
                progress["sources"][name] = source.stat().st_size
                if time.monotonic() - self.saved >= SAVE_EVERY:
                    self._save(files.lengths())
            progress["is_piled"] = True
            self._save(files.lengths())

    def _check_sources(self, now: dict[str, int]) -> None:
        """Files that are in the piles must be as they were; those to come may have been mended."""
        for name, size in self.progress["sources"].items():
            if now.get(name) != size:
                raise UserError(
                    f"{self.work} was begun with other source files: {name} had {size} bytes; "
                    "restore it, or remove the folder to begin anew"
                )
        if len(now) != len(self.progress["sources"]):
            raise UserError(
                f"{self.work} was begun with fewer source files: remove it to begin anew"
            )

    def deal(self) -> None:
        """The piles, each sorted by its keys, into validation and chunks."""
        progress, plan = self.progress, self.plan
        if progress["documents"] < plan.n_validation + plan.n_chunks:
            raise UserError(_too_few(progress["documents"], plan))
        _refuse_other(self.work, progress["dealing"] or plan.request, plan.request)
        if progress["dealing"] is None:
            progress["dealing"] = plan.request
            self._save(progress["lengths"])
        outputs = [self.work / name for name in self._outputs()]
        first_chunk = len(outputs) - plan.n_chunks
        for i in range(progress["dealt"]):  # killed before it could remove them
            self._pile(i).unlink(missing_ok=True)
        with _Appended(outputs, progress["lengths"]) as files:
            for i in range(progress["dealt"], progress["n_piles"]):
                n_dealt = progress["dealt_documents"]
                for line in _sorted_lines(self._pile(i), self._budget, progress["n_piles"]):
                    after_validation = n_dealt - plan.n_validation
                    turn = first_chunk + after_validation % plan.n_chunks
                    files.write(0 if after_validation < 0 else turn, line)
                    n_dealt += 1
                    self._tell("{:,} of {:,} documents dealt", n_dealt, progress["documents"])
                progress["dealt"], progress["dealt_documents"] = i + 1, n_dealt
                self._save(files.lengths())
                self._pile(i).unlink()  # only now: whoever goes on reads it no more

    def finish(self) -> dict[str, Any]:
        """The manifest, which says that all is there."""
        progress = self.progress
        assert progress["dealt_documents"] == progress["documents"], "documents were lost"
        files = {}
        for name, n in self._outputs().items():
            path = self.work / name
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"documents": n, "bytes": path.stat().st_size, "sha256": digest}
        manifest = {
            "request": self.plan.request,
            "documents": progress["documents"],
            "without_text": progress["without_text"],
            "files": files,
            "sources": progress["sources"],
        }
        shutil.rmtree(self.work / "piles", ignore_errors=True)
        write_atomic(self.work / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
        return manifest

    @property
    def _budget(self) -> int:
        return max(int(self.plan.memory * MEMORY_SHARE), 1)

    def _outputs(self) -> dict[str, int]:
        """File -> its documents: validation first, if there is any, then the chunks."""
        name, n_chunks, n_validation = self.plan.name, self.plan.n_chunks, self.plan.n_validation
        width = max(len(str(n_chunks - 1)), 2)
        whole, rest = divmod(self.progress["documents"] - n_validation, n_chunks)
        validation = {f"{name}.val.jsonl": n_validation} if n_validation else {}
        return validation | {
            f"{name}.chunk.{i:0{width}d}.jsonl": whole + (i < rest) for i in range(n_chunks)
        }

    def _pile(self, i: int) -> Path:
        return self.work / "piles" / f"{i:03d}.jsonl"

    def _save(self, lengths: dict[str, int]) -> None:
        self.progress["lengths"] = lengths
        write_atomic(self.work / PROGRESS_NAME, json.dumps(self.progress))
        self.saved = time.monotonic()

    def _tell(self, message: str, *values: Any) -> None:
        now = time.monotonic()
        if now - self.told > TELL_EVERY:
            self.told = now
            self.tell(message.format(*values))


def _too_few(n_documents: int, plan: ShufflePlan) -> str:
    begins = f"there are {n_documents} documents with text, too few for"
    chunks = f"one in each of {plan.n_chunks} chunks; lower --nchunks"
    if not plan.n_validation:
        return f"{begins} {chunks}"
    return (
        f"{begins} --validation_documents {plan.n_validation} and {chunks} or "
        "--validation_documents (0: none are held out)"
    )


class _Appended:
    """Files that are written at their ends, first cut back to the lengths that are known."""

    def __init__(self, paths: Sequence[Path], lengths: dict[str, int]):
        self.paths = paths
        self.begin = [lengths.get(path.name, 0) for path in paths]

    def __enter__(self) -> _Appended:
        self.stack = ExitStack()
        self.files: list[BinaryIO] = []
        with ExitStack() as opening:
            for path, length in zip(self.paths, self.begin, strict=True):
                path.parent.mkdir(exist_ok=True)
                file = opening.enter_context(open(path, "ab"))
                if file.tell() < length:
                    raise UserError(
                        f"{path} is shorter than it was: remove {path.parent}, begin anew"
                    )
                file.truncate(length)
                self.files.append(file)
            self.stack = opening.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def write(self, number: int, line: bytes) -> None:
        self.files[number].write(line)

    def lengths(self) -> dict[str, int]:
        """Of the files by name; all that was written is on the disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        return {path.name: file.tell() for path, file in zip(self.paths, self.files, strict=True)}


def _n_piles(n_bytes: int, budget: int) -> int:
    return max(-(-n_bytes // budget), 1)


def _key(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=KEY_BITS // 8)
    return int.from_bytes(digest.digest(), "big")


def _keyed(key: int, line: bytes) -> bytes:
    """A line of a pile: the key in KEY_DIGITS hexadecimal digits, then the line."""
    return b"%016x" % key + line


def _sorted_lines(pile: Path, budget: int, scale: int) -> Iterator[bytes]:
    """The lines of a pile by their keys, and without them; at most `budget` bytes are held.

    What is larger is piled again. `scale` is the product of the numbers of piles: the keys here lie
    in one part in `scale` of all.
    """
    lines: list[bytes] = []
    held = 0
    with open(pile, "rb") as file:
        for line in file:
            held += len(line) + LINE_OVERHEAD
            if held > budget and lines:  # one line is held, however long it is
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


def _to_line(document: dict[str, str]) -> bytes:
    return (json.dumps(document, ensure_ascii=False) + "\n").encode("utf-8")


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{file} is damaged: remove {file.parent} and run again") from None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What the old request asks for where the new one does not."""
    return ", ".join(f"{key}={old.get(key)}" for key in new if old.get(key) != new[key])
