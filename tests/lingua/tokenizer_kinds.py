"""A small tokenizer of every kind, each made once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from lingua.tokenizer import Tokenizer, build_tokenizer

TEXTS = [
    "The function returns a list, and the list isn't empty.",
    "Zwölf Boxkämpfer jagen Viktor quer über den Deich.",
    "def f(x):\n    return x + 1\n\n\nprint(f(2))  # a comment",
]


@cache
def make_tokenizer(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return build_tokenizer(*TOKENIZER_KINDS[kind](Path(folder)))


def sentencepiece(folder: Path, **options: Any) -> tuple[str, str]:
    spm = pytest.importorskip("sentencepiece")
    lines = [line for text in TEXTS for line in text.splitlines() if line]
    (folder / "corpus.txt").write_text("\n".join(lines * 20), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return "sp", str(folder)


def hugging_face(folder: Path, tokenizer: Any, trainer: Any = None, **config: Any):
    if trainer is not None:
        tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return "hf", str(folder)


def byte_level(folder: Path, specials=("<s>", "</s>"), **config: Any) -> tuple[str, str]:
    """As GPT-2; its post-processor moves blanks between the offsets of tokens."""
    tk = pytest.importorskip("tokenizers")
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(specials),
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.post_processor = tk.processors.ByteLevel(trim_offsets=True)
    return hugging_face(folder, tokenizer, trainer, **config)


def byte_fallback(folder: Path) -> tuple[str, str]:
    """As Llama 2."""
    tk = pytest.importorskip("tokenizers")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *"abcdefghijklmnopqrstuvwxyzT.,", "th", "▁th", "▁the", "re", "▁re"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("r", "e"), ("▁", "re")]
    vocab = {name: i for i, name in enumerate(names)}
    model = tk.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = tk.Tokenizer(model)
    tokenizer.normalizer = tk.normalizers.Sequence(
        [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tk.decoders.Sequence(
        [
            tk.decoders.Replace("▁", " "),
            tk.decoders.ByteFallback(),
            tk.decoders.Fuse(),
            tk.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(names[:3])
    return hugging_face(folder, tokenizer)


def wordpiece(folder: Path) -> tuple[str, str]:
    """As BERT."""
    tk = pytest.importorskip("tokenizers")
    tokenizer = tk.Tokenizer(tk.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tk.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tk.decoders.WordPiece()
    trainer = tk.trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    return hugging_face(folder, tokenizer, trainer)


def metaspace(folder: Path) -> tuple[str, str]:
    """As T5, without BOS."""
    tk = pytest.importorskip("tokenizers")
    tokenizer = tk.Tokenizer(tk.models.Unigram())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Metaspace()
    tokenizer.decoder = tk.decoders.Metaspace()
    trainer = tk.trainers.UnigramTrainer(
        vocab_size=100,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return hugging_face(folder, tokenizer, trainer, eos_token="</s>")


TOKENIZER_KINDS = {
    "bytes": lambda folder: ("bytes", None),
    "sp-bpe": lambda folder: sentencepiece(
        folder, model_type="bpe", vocab_size=350, byte_fallback=True
    ),
    "sp-unigram": lambda folder: sentencepiece(
        folder, model_type="unigram", vocab_size=60, bos_id=-1
    ),
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "wordpiece": wordpiece,
    "metaspace": metaspace,
}
