"""Build small tasks from the held-out documents of `setup/prepare_local_data.py`, offline.

    lt2_local_choice       choose the ending of a passage among four (chance is 25%)
    lt2_local_cloze        predict a word in the second half of a passage
    lt2_local_copy         continue a passage that was shown before
    lt2_local_perplexity   rolling log-likelihood of whole documents

The YAML files in this folder call these functions. `harness.metadata.folder=/path` replaces the
folder data/local. The same documents always give the same items.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lingua.dataloader.jsonl import find_val_files, iter_val_documents

N_ITEMS = 200  # of each task, at most
N_WRONG = 3  # wrong endings of an item
MIN_WORDS, MAX_WORDS = 20, 60  # of a passage

Item = dict[str, Any]


def choice(folder: str = "data/local", **_: Any) -> dict[str, Any]:
    return as_dataset(choice_items(read_documents(folder)))


def cloze(folder: str = "data/local", **_: Any) -> dict[str, Any]:
    return as_dataset(cloze_items(read_documents(folder)))


def copy(folder: str = "data/local", **_: Any) -> dict[str, Any]:
    return as_dataset(copy_items(read_documents(folder)))


def documents(folder: str = "data/local", **_: Any) -> dict[str, Any]:
    return as_dataset([{"text": text} for text in read_documents(folder)])


def as_dataset(items: list[Item]) -> dict[str, Any]:
    import datasets  # comes with lm_eval

    return {"test": datasets.Dataset.from_list(items[:N_ITEMS])}


def read_documents(folder: str) -> list[str]:
    if not find_val_files(folder, [""]):
        raise FileNotFoundError(
            f"no *.val.jsonl in {folder} (cwd {Path.cwd()}); run python "
            "setup/prepare_local_data.py --out data/local, or set harness.metadata.folder"
        )
    return list(iter_val_documents(folder, [""]))


def passages(texts: list[str]) -> Iterator[list[str]]:
    """Yield the words of each paragraph of MIN_WORDS to MAX_WORDS words."""
    for text in texts:
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            if MIN_WORDS <= len(words) <= MAX_WORDS:
                yield words


def choice_items(texts: list[str]) -> list[Item]:
    """Split each passage in the middle. The wrong endings come from other passages."""
    rng = random.Random(0)
    halves = []
    for words in passages(texts):
        middle = len(words) // 2
        halves.append((" ".join(words[:middle]), " ".join(words[middle : middle + 8])))
    endings = [ending for _, ending in halves]
    items = []
    for start, right in halves:
        wrong = rng.sample([e for e in endings if e != right], N_WRONG)
        gold = rng.randrange(N_WRONG + 1)
        items.append(
            {"start": start, "choices": [*wrong[:gold], right, *wrong[gold:]], "gold": gold}
        )
    return items


def cloze_items(texts: list[str]) -> list[Item]:
    rng = random.Random(0)
    items = []
    for words in passages(texts):
        at = rng.randrange(len(words) // 2, len(words))
        items.append({"context": " ".join(words[:at]), "word": re.sub(r"\W+$", "", words[at])})
    return [item for item in items if item["word"]]


def copy_items(texts: list[str]) -> list[Item]:
    items = []
    for words in passages(texts):
        middle = len(words) // 2
        prompt = " ".join(words) + "\n\n" + " ".join(words[:middle])
        items.append({"prompt": prompt, "next": " ".join(words[middle : middle + 2])})
    return items


def score_copy(doc: Item, results: list[str]) -> dict[str, float]:
    return {"acc": float(results[0].strip().startswith(doc["next"]))}
