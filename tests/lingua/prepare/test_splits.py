"""Test and validation files of a published corpus stay out of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from lingua.errors import UserError
from lingua.prepare.sources import find_document_files
from lingua.prepare.splits import select_split, split_of_path

TRAIN = """
data/train-00000-of-00004.parquet default/train/0000.parquet default/partial-train/0000.parquet
en/c4-train.00000-of-01024.json.gz train_sft-00000-of-00001.parquet train2014.jsonl Train.jsonl
train/chunk1/example_train_1.jsonl.zst auxiliary_train-00000-of-00001.parquet training/a.jsonl
dev_corpus/train-0.parquet x.chunk.00.jsonl CC-MAIN-2013-20/000_00000.parquet 0000.parquet
latest.parquet contest.jsonl training_notes.jsonl testing_notes.jsonl attestation.jsonl
developers/a.jsonl validity.jsonl invalid.jsonl medieval.jsonl retrieval.jsonl spätest.jsonl
"""
VALIDATION = """
data/validation-00000-of-00001-a09b74b3ef9c3b56.parquet en/c4-validation.00000-of-00008.json.gz
dev.jsonl valid.jsonl wiki.val.jsonl val2014.jsonl validation_matched-00000-of-00001.parquet
DEV/x.parquet eng.devel.jsonl held-out.jsonl validation/chunk1/example_holdout_1.jsonl.zst
"""
TEST = """
data/test-00000-of-00001.parquet data/test/x.parquet default/test/0000.parquet test/a/b/c.jsonl
wiki.test.jsonl test2017.parquet eval.jsonl evaluation/x.parquet nli_testing.jsonl devtest.jsonl
testset.jsonl test-clean/0.parquet test_sft-00000-of-00001.parquet train/test_1.jsonl
test/training_notes.jsonl test/chunk1/example_holdout_1.jsonl.zst
"""


@pytest.mark.parametrize(
    "split, names", [("train", TRAIN), ("validation", VALIDATION), ("test", TEST)]
)
def test_paths_name_splits(split, names):
    assert {name: split_of_path(name) for name in names.split()} == dict.fromkeys(
        names.split(), split
    )


def make(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text": "x"}\n')
    return folder


def select(folder: Path, split: str = "train") -> tuple[set[str], str | None]:
    files, line = select_split(find_document_files(folder), folder, split)
    return {file.relative_to(folder).as_posix() for file in files}, line


def test_a_split_is_selected_and_the_others_are_listed_in_one_line(tmp_path):
    make(tmp_path, "more.jsonl", "train.jsonl", "test/0.jsonl", "test/1.jsonl", "dev.jsonl")
    train, line = select(tmp_path)
    assert train == {"more.jsonl", "train.jsonl"}
    assert line is not None and "test (2), validation (1)" in line and "\n" not in line
    for name in ("validation", "dev", "val"):
        assert select(tmp_path, name)[0] == {"dev.jsonl"}
    assert select(tmp_path, "test")[0] == {"test/0.jsonl", "test/1.jsonl"}
    assert len(select(tmp_path, "all")[0]) == 5 and select(tmp_path, "all")[1] is None


@pytest.mark.parametrize(
    "names, split, found",
    [
        (["test.jsonl"], "train", r"test \(1\)"),
        (["test.jsonl", "dev/0.jsonl"], "train", r"test \(1\), validation \(1\)"),
        (["train.jsonl"], "test", r"train \(1\)"),
        (["train.jsonl", "test.jsonl"], "tset", r"test \(1\), train \(1\)"),
    ],
)
def test_a_split_without_files_lists_those_that_have_some(tmp_path, names, split, found):
    make(tmp_path, *names)
    with pytest.raises(UserError, match=f"{split}, only of {found}: .*--split"):
        select(tmp_path, split)


def test_the_folder_that_is_given_names_no_split(tmp_path):
    assert select(make(tmp_path / "test", "a.jsonl"))[0] == {"a.jsonl"}


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "part_[01].jsonl"
  - split: test
    path: [./part_2.jsonl, more/**]
  - split: unsupervised
    path: part_3.jsonl
- config_name: of names
  data_files: "*.jsonl"
---
# A corpus
"""


def test_a_dataset_card_decides_before_names_do(tmp_path):
    make(tmp_path, *(f"part_{i}.jsonl" for i in range(5)), "more/a/b.jsonl", "dev.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    assert select(tmp_path)[0] == {"part_0.jsonl", "part_1.jsonl", "part_4.jsonl"}
    assert select(tmp_path, "test")[0] == {"part_2.jsonl", "more/a/b.jsonl"}
    assert select(tmp_path, "unsupervised")[0] == {"part_3.jsonl"}
    assert select(tmp_path, "dev")[0] == {"dev.jsonl"}


def test_a_file_of_two_splits_is_not_trained_on(tmp_path):
    make(tmp_path, "part_0.jsonl", "part_1.jsonl")
    (tmp_path / "README.md").write_text(CARD.replace("part_2", "part_0"))
    assert select(tmp_path)[0] == {"part_1.jsonl"}


@pytest.mark.parametrize(
    "card", ["", "# A corpus", "---\n: [\n---\n", "---\n3\n---\n", "---\nconfigs: {a: [1]}\n---\n",
             "---\nconfigs:\n- data_files:\n  - split: test\n---\n"]
)  # fmt: skip
def test_other_cards_leave_it_to_the_names(tmp_path, card):
    make(tmp_path, "a.jsonl", "test.jsonl")
    (tmp_path / "README.md").write_text(card)
    assert select(tmp_path)[0] == {"a.jsonl"}


@pytest.mark.parametrize(
    "configs, want",
    [
        ({"en": "en/train*", "de": "de/train*"}, True),
        ({"default": "**/train*.jsonl", "en": "en/train*"}, False),
        ({"en": "en/train*", "fr": "fr/train*"}, False),  # not downloaded
        ({"en": "e*/train*", "english": "en/train*", "de": "de/train*"}, True),
    ],
)
def test_configs_that_are_read_together_are_listed(configs, want, tmp_path):
    make(tmp_path, "en/train-0.jsonl", "de/train-0.jsonl", "de/test-0.jsonl")
    text = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {path!r}}}\n"
        for name, path in configs.items()
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
    files, line = select(tmp_path)
    assert files == {"en/train-0.jsonl", "de/train-0.jsonl"}
    assert ("--source_dir" in (line or "")) == want
