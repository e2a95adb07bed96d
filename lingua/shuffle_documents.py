"""Shuffle more documents than memory holds, and deal them into a source of training data.

    sources  ->  piles on disk      each document to a random one
    piles    ->  one order          each pile is shuffled in memory, and they follow each other
    order    ->  <name>.val.jsonl   the first `n_validation` documents,
                 <name>.chunk.*     and the others in turn: chunks differ by a document at most

That is a shuffle of all documents in which every order is as likely as any other (Rao 1961,
Sandelius 1962). It follows from the seed and the names of the source files alone.

What is done is written down after each source file and each pile, with the lengths that the files
had then. A run that was killed cuts its files back to them and goes on, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lingua.args import UserError, fsync_path, write_atomic
from lingua.document_files import estimate_text_bytes, read_documents

PROGRESS_NAME = "progress.json"
MANIFEST_NAME = "manifest.json"
MAX_PILES = 256  # files that are open at a time
MEMORY_SHARE = 0.5  # of the memory that is given, for the lines of a pile; the rest is overhead
TELL_EVERY = 10.0  # seconds

Tell = Callable[[str], None]


@dataclass(frozen=True)
class ShufflePlan:
    name: str  # start of the names of the files
    seed: int
    n_chunks: int
    n_validation: int  # documents
    memory: int  # bytes

    def request(self, sources: Sequence[Path], root: Path) -> dict[str, Any]:
        """What the result follows from; `memory` decides on the piles, and so on the order."""
        return {
            "name": self.name,
            "seed": self.seed,
            "nchunks": self.n_chunks,
            "validation_documents": self.n_validation,
            "memory": self.memory,
            "sources": {str(file.relative_to(root)): file.stat().st_size for file in sources},
        }


def shuffle_documents(
    sources: Sequence[Path], root: Path, out: Path, plan: ShufflePlan, tell: Tell = print
) -> dict[str, Any]:
    """Make the folder `out`, a source for `data.sources`, of files below `root`; its manifest.

    `out` appears when all of it is there; until then the work lies in `<out>.unfinished`. A folder
    that is complete is left alone, and one that was made of something else is a UserError.
    """
    request = plan.request(sources, root)
    finished = _read_json(out / MANIFEST_NAME)
    if finished is not None:
        if finished["request"] == request:
            tell(f"{out}: complete, nothing to do")
            return finished
        raise UserError(
            f"{out} was made with {_differences(finished['request'], request)}; move it away"
        )
    if out.exists():
        raise UserError(f"{out} exists and has no {MANIFEST_NAME}: move it away")
    work = out.with_name(f"{out.name}.unfinished")
    manifest = _read_json(work / MANIFEST_NAME)
    if manifest is None or manifest["request"] != request:
        shuffle = _Shuffle(work, plan, request, tell)
        shuffle.scatter(sources, root)
        shuffle.deal()
        manifest = shuffle.finish()
    os.replace(work, out)
    fsync_path(out.parent)
    return manifest


class _Shuffle:
    """The work in a folder, as far as `progress` says."""

    def __init__(self, work: Path, plan: ShufflePlan, request: dict[str, Any], tell: Tell):
        self.work, self.plan, self.request, self.tell = work, plan, request, tell
        self.told = time.monotonic()
        work.mkdir(parents=True, exist_ok=True)
        saved = _read_json(work / PROGRESS_NAME)
        if saved is not None and saved["request"] != request:
            raise UserError(
                f"{work} was begun with {_differences(saved['request'], request)}: remove it to "
                "begin anew"
            )
        self.progress: dict[str, Any] = saved or {
            "request": request,
            "n_piles": None,
            "scattered": 0,  # source files
            "documents": 0,  # of these
            "without_text": 0,
            "dealt": 0,  # piles
            "dealt_documents": 0,
            "lengths": {},  # of files, when this was written
        }

    def scatter(self, sources: Sequence[Path], root: Path) -> None:
        """Every source file into the piles."""
        progress = self.progress
        if progress["n_piles"] is None:
            expected = sum(map(estimate_text_bytes, sources))
            progress["n_piles"] = min(_n_piles(expected, self._budget), MAX_PILES)
        piles = [self._pile(i) for i in range(progress["n_piles"])]
        if progress["scattered"] == len(sources):
            return
        with _Appended(piles, progress["lengths"]) as files:
            for number, source in enumerate(
                sources[progress["scattered"] :], progress["scattered"]
            ):
                name = str(source.relative_to(root))
                draw = random.Random(f"{self.plan.seed}/{name}").randrange
                for document in read_documents(source):
                    if not document["text"]:
                        progress["without_text"] += 1
                        continue
                    files.write(draw(len(piles)), _to_line(document))
                    progress["documents"] += 1
                    self._tell("{:,} documents read, now {}", progress["documents"], name)
                progress["scattered"] = number + 1
                self._save(files.lengths())
        if progress["documents"] < self.plan.n_validation + self.plan.n_chunks:
            raise UserError(
                f"there are {progress['documents']} documents with text, too few for "
                f"{self.plan.n_validation} of validation and one in each of {self.plan.n_chunks} "
                "chunks; lower --nchunks or --validation_documents"
            )

    def deal(self) -> None:
        """The piles, each shuffled, into validation and chunks."""
        progress, plan = self.progress, self.plan
        outputs = [self.work / name for name in self._output_names()]
        with _Appended(outputs, progress["lengths"]) as files:
            for i in range(progress["dealt"], progress["n_piles"]):
                n_dealt = progress["dealt_documents"]
                for line in _shuffled_lines(self._pile(i), f"{plan.seed}/pile {i}", self._budget):
                    after_validation = n_dealt - plan.n_validation
                    place = 0 if after_validation < 0 else 1 + after_validation % plan.n_chunks
                    files.write(place, line)
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
        for number, name in enumerate(self._output_names()):
            path = self.work / name
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            n = self._n_documents(number)
            files[name] = {"documents": n, "bytes": path.stat().st_size, "sha256": digest}
        manifest = {
            "request": self.request,
            "documents": progress["documents"],
            "without_text": progress["without_text"],
            "files": files,
        }
        shutil.rmtree(self.work / "piles", ignore_errors=True)
        write_atomic(self.work / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
        (self.work / PROGRESS_NAME).unlink()
        fsync_path(self.work)
        return manifest

    @property
    def _budget(self) -> int:
        return max(int(self.plan.memory * MEMORY_SHARE), 1)

    def _output_names(self) -> list[str]:
        width = max(len(str(self.plan.n_chunks - 1)), 2)
        chunks = [f"{self.plan.name}.chunk.{i:0{width}d}.jsonl" for i in range(self.plan.n_chunks)]
        return [f"{self.plan.name}.val.jsonl", *chunks]

    def _n_documents(self, number: int) -> int:
        if number == 0:
            return self.plan.n_validation
        whole, rest = divmod(
            self.progress["documents"] - self.plan.n_validation, self.plan.n_chunks
        )
        return whole + (number - 1 < rest)

    def _pile(self, i: int) -> Path:
        return self.work / "piles" / f"{i:03d}.jsonl"

    def _save(self, lengths: dict[str, int]) -> None:
        self.progress["lengths"] = lengths
        write_atomic(self.work / PROGRESS_NAME, json.dumps(self.progress))

    def _tell(self, message: str, *values: Any) -> None:
        now = time.monotonic()
        if now - self.told > TELL_EVERY:
            self.told = now
            self.tell(message.format(*values))


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


def _shuffled_lines(pile: Path, seed: str, budget: int) -> Iterator[bytes]:
    """The lines of a pile in random order. One that is larger than `budget` is piled again."""
    size = pile.stat().st_size
    if size <= budget or _has_one_line(pile):
        with open(pile, "rb") as file:
            lines = list(file)
        random.Random(seed).shuffle(lines)
        yield from lines
        return
    parts = [
        pile.with_suffix(f".{i:03d}.jsonl")
        for i in range(min(_n_piles(size, budget) + 1, MAX_PILES))
    ]
    for part in parts:
        part.unlink(missing_ok=True)  # of a run that was killed
    draw = random.Random(f"{seed}/piled").randrange
    with _Appended(parts, {}) as files, open(pile, "rb") as file:
        for line in file:
            files.write(draw(len(parts)), line)
    for i, part in enumerate(parts):
        yield from _shuffled_lines(part, f"{seed}/{i}", budget)
        part.unlink()


def _has_one_line(file: Path) -> bool:
    with open(file, "rb") as lines:
        next(lines, None)
        return next(lines, None) is None


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
    told = [
        f"{key}={old.get(key)}" if key != "sources" else "other source files"
        for key in new
        if old.get(key) != new[key]
    ]
    return ", ".join(told)
