"""Separate the splits of a published corpus, so that test text stays out of training.

The dataset card (README.md) of a folder from the Hugging Face Hub may list the files of each split.
Other files belong to the split that their path names, by the words that the Hub knows:

    data/test-00000-of-00001.parquet    default/validation/0000.parquet    wiki.dev.jsonl

A file without such a word belongs to train. Words must be whole: latest.parquet is a train file.
The name of a .md file is its subject, so only its folders count: dev.md is a train file.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lingua.config.yaml import yaml_value
from lingua.errors import UserError
from lingua.prepare.readers import format_of
from lingua.prepare.sources import CARD

ALL = "all"
# Words of a name, joined by blanks. Words for an activity count only at the end of a name:
# training_notes is no split.
OTHER_SPLITS = {
    "test": re.compile(r"\b(?:test|eval|devtest)(?:set|split|data)?\b|\b(?:testing|evaluation)$"),
    "validation": re.compile(
        r"\b(?:validation|valid|val|dev|devel|held ?out|hold ?out)(?:set|split|data)?\b"
    ),
}
TRAIN = re.compile(r"\btrain(?:ing|set|split|data)?$")
SHARD = re.compile(
    r"\W\d+-of-\d+.*|(?:\.(?:parquet|arrow|jsonl?|txt|gz|zst))+$"
)  # not a part of the name


def select_split(files: Sequence[Path], folder: Path, split: str) -> tuple[list[Path], str | None]:
    """Return the files of a split, and a line about the files of other splits, if any.

    `files` are below `folder`. `split` may be "all". UserError if the split has no files.
    """
    wanted = split if split == ALL else canonical(split)
    by_card = dict(read_card(folder))
    names = [file.relative_to(folder).as_posix() for file in files]
    splits = [by_card.get(name) or split_of_path(name) for name in names]
    selected = [f for f, found in zip(files, splits, strict=True) if wanted in (found, ALL)]
    others = Counter(found for found in splits if wanted not in (found, ALL))
    listed = ", ".join(f"{name} ({n:,})" for name, n in sorted(others.items()))
    if not selected:
        raise UserError(
            f"{folder} has no files of the split {wanted}, only of {listed}: choose one of these "
            f"with --split, or {ALL}"
        )
    lines = describe_configs({file.relative_to(folder).as_posix() for file in selected}, folder)
    if others:
        lines.append(f"{folder}: files of other splits skipped: {listed}; --split selects a split")
    return selected, "\n".join(lines) or None


def describe_configs(selected: set[str], folder: Path) -> list[str]:
    """Return a line if the card has several configs, and none of them has all selected files."""
    found: dict[str, set[str]] = {}
    for entry in _card_entries(folder / CARD):
        found.setdefault(entry["config"], set()).update(_matches(entry, folder))
    found = {config: files & selected for config, files in found.items() if files & selected}
    if len(found) < 2 or selected in found.values():
        return []
    return [
        f"{folder}: reads the configs {', '.join(sorted(found))} together. A text in two of them "
        "is read twice, and may be both in training and in validation; give --source_dir the "
        "folder of one config to avoid this"
    ]


def canonical(split: str) -> str:
    """Return train, test or validation for the names of these splits, other names unchanged."""
    words = words_of(split)
    for name, pattern in OTHER_SPLITS.items():
        if pattern.search(words):
            return name
    return "train" if re.search(r"\btrain(?:ing)?\b", words) else split


def split_of_path(name: str) -> str:
    """Return the split of a file by its path: test before validation, train without any word.

    A name that ends in "train" overrules the folders above it, as in dev_corpus/train.parquet.
    """
    found: set[str] = set()
    path = PurePosixPath(name)
    for part in reversed((path.parent if format_of(path) == ".md" else path).parts):
        words = words_of(part)
        here = {split for split, pattern in OTHER_SPLITS.items() if pattern.search(words)}
        if not here and TRAIN.search(words):
            break
        found |= here
    return next((split for split in OTHER_SPLITS if split in found), "train")


def words_of(name: str) -> str:
    """Return the words of a file's or folder's name, without shard numbers and suffixes."""
    return " ".join(filter(None, re.split(r"[\W\d_]+", SHARD.sub("", name.lower()))))


def read_card(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, split) for the `data_files` of a dataset card, other splits than train last."""
    entries = list(_card_entries(folder / CARD))
    for is_other in (False, True):
        for entry in entries:
            split = canonical(str(entry["split"]))
            if (split != "train") == is_other:
                yield from ((name, split) for name in _matches(entry, folder))


def _matches(entry: dict[str, Any], folder: Path) -> Iterator[str]:
    paths = entry.get("path")
    for pattern in [paths] if isinstance(paths, str) else paths or []:
        for found in glob.iglob(str(pattern), root_dir=folder, recursive=True):
            yield PurePosixPath(found).as_posix()  # without ./


def _card_entries(card: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of `configs: [{data_files: [...]}]` that name a split, with `config`."""
    try:
        text = card.read_text(encoding="utf-8-sig") if card.is_file() else ""
        header = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
        configs = yaml_value(header[1])["configs"] if header else []
    except (OSError, ValueError, KeyError, TypeError):  # written by others: the names must do
        return
    for config in configs if isinstance(configs, list) else []:
        files = config.get("data_files") if isinstance(config, dict) else None
        for entry in files if isinstance(files, list) else []:
            if isinstance(entry, dict) and "split" in entry:
                yield entry | {"config": str(config.get("config_name"))}
