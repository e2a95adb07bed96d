"""Tokenizers: text to token ids and back, behind one small interface.

    bytes     256 byte values, then bos and eos; needs no file
    tiktoken  a file of mergeable ranks in base64, read as in Llama 3
    sp        a SentencePiece model
    hf        a Hugging Face tokenizer.json, or a folder that contains one

`encode` adds special tokens only for `add_bos` and `add_eos`, never for their names in the text.
`decode` drops bos, eos and ids without a token. It shows incomplete UTF-8 as U+FFFD, so any prefix
of a stream can be decoded. The packages of the last three are imported when a tokenizer is built.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from lingua.errors import UserError, import_optional
from lingua.files.listing import file_sha256

logger = logging.getLogger(__name__)

CONFIG_NAME = "tokenizer_config.json"  # next to the file of an hf tokenizer
SPECIALS_NAME = "special_tokens_map.json"  # the same keys, in older folders


@dataclass
class TokenizerArgs:
    name: str = "bytes"  # bytes, tiktoken (Llama 3 files), sp (SentencePiece) or hf
    path: str | None = None  # the tokenizer's file or folder; null for bytes
    sha256: str | None = None  # of that file; training sets it, and compares it on resume

    def __post_init__(self) -> None:
        if self.name not in TOKENIZERS:
            known = ", ".join(sorted(TOKENIZERS))
            raise UserError(f"data.tokenizer.name must be one of {known}, got {self.name!r}")


class Tokenizer(ABC):
    n_words: int  # size of the vocabulary, special tokens included
    bos_id: int  # -1 if the vocabulary has none
    eos_id: int
    gaps: Sequence[int] = ()  # ids below n_words without a token

    def check_specials(self, add_bos: bool, add_eos: bool) -> None:
        """Raise UserError for options that need tokens that the vocabulary lacks."""
        roles = (("bos", add_bos, self.bos_id), ("eos", add_eos, self.eos_id))
        missing = [role for role, added, token in roles if added and token < 0]
        if missing:
            given = " and ".join(f"data.add_{role}=true" for role in missing)
            advice = given.replace("true", "false") + "".join(map(self._hint, missing))
            tokens = f"{' and no '.join(missing)} token"
            raise UserError(f"{given}, but the tokenizer has no {tokens}; set {advice}")

    def _hint(self, role: str) -> str:
        return ""

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]:
        self.check_specials(add_bos, add_eos)
        tokens = self._encode(well_formed(text))
        return [self.bos_id] * add_bos + tokens + [self.eos_id] * add_eos

    def get_token_offsets(
        self, text: str, tokens: list[int] | None = None
    ) -> tuple[list[str], list[int]]:
        """Return for each token its part of `text`, and the character where it starts.

        Tokens may share a character of several bytes: all start at it, the last one gets it as its
        part and the others get "". So the parts join to `text`. bos and eos start where the next
        token does. `tokens` must be the result of `encode` for `text`.
        """
        text = well_formed(text)
        if tokens is None:
            tokens = self._encode(text)
        special = {self.bos_id, self.eos_id}
        starts = self._token_starts(text, [t for t in tokens if t not in special])
        starts[:1] = [0] * len(starts[:1])  # some tokenizers drop blanks at the start of a text
        offsets: list[int] = []
        upcoming = len(text)  # from the right, as a special starts where the next token does
        for token in reversed(tokens):
            if token not in special:
                upcoming = starts.pop()
            offsets.append(upcoming)
        offsets.reverse()
        ends = [*offsets[1:], len(text)] if offsets else []
        return [text[s:e] for s, e in zip(offsets, ends, strict=True)], offsets

    def decode(self, tokens: list[int]) -> str:
        specials = (self.bos_id, self.eos_id)
        return self._decode([t for t in tokens if t < self.n_words and t not in specials])

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, tokens: list[int]) -> str: ...

    @abstractmethod
    def _token_starts(self, text: str, tokens: list[int]) -> list[int]:
        """Return the character of `text` in which each token starts."""


class NoTokenizer(Tokenizer):
    """Stands for the tokenizer of a model whose tokens are not of text. Every use is an error."""

    def __init__(self, why: str) -> None:
        self.bos_id = self.eos_id = -1
        self.n_words, self.why = 0, why

    def _encode(self, text: str) -> list[int]:
        raise self._error()

    def _decode(self, tokens: list[int]) -> str:
        raise self._error()

    def _token_starts(self, text: str, tokens: list[int]) -> list[int]:
        raise self._error()

    def _error(self) -> UserError:
        return UserError(f"{self.why}, so it reads no text; evaluate it with apps.LT2.eval")


class ByteTokenizer(Tokenizer):
    def __init__(self) -> None:
        self.bos_id, self.eos_id, self.n_words = 256, 257, 258

    def _encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def _decode(self, tokens: list[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")

    def _token_starts(self, text: str, tokens: list[int]) -> list[int]:
        return starts_from_bytes([bytes([t]) for t in tokens])


class TikTokenTokenizer(Tokenizer):
    """Mergeable ranks with the split rule of Llama 3, and 256 special tokens after the ranks."""

    SPLIT = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    N_SPECIAL = 256
    NAMED_SPECIALS = {  # by position among the 256; the others are reserved
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }

    def __init__(self, path: Path) -> None:
        tiktoken = import_optional("tiktoken", extra="", needed_by="data.tokenizer.name=tiktoken")
        ranks = read_mergeable_ranks(path)
        self.n_ranks = len(ranks)
        reserved = (f"<|reserved_special_token_{i}|>" for i in range(self.N_SPECIAL))
        specials = [self.NAMED_SPECIALS.get(i) or next(reserved) for i in range(self.N_SPECIAL)]
        self.model = tiktoken.Encoding(
            name=path.name,
            pat_str=self.SPLIT,
            mergeable_ranks=ranks,
            special_tokens={name: self.n_ranks + i for i, name in enumerate(specials)},
        )
        self.n_words = self.model.n_vocab
        self.bos_id, self.eos_id = self.n_ranks, self.n_ranks + 1

    def _encode(self, text: str) -> list[int]:
        return [t for part in split_safely(text) for t in self.model.encode_ordinary(part)]

    def _decode(self, tokens: list[int]) -> str:
        return self.model.decode(tokens, errors="replace")

    def _token_starts(self, text: str, tokens: list[int]) -> list[int]:
        return starts_from_bytes(self.model.decode_tokens_bytes(tokens))


class SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        sentencepiece = import_optional(
            "sentencepiece", extra="sentencepiece", needed_by="data.tokenizer.name=sp"
        )
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"data.tokenizer.path={path} is not a SentencePiece model") from error
        self.n_words = self.model.vocab_size()
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()

    def _encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def _decode(self, tokens: list[int]) -> str:
        return self.model.decode(tokens)

    def _token_starts(self, text: str, tokens: list[int]) -> list[int]:
        # neither method needs the package protobuf
        if hasattr(self.model, "encode_as_offset_mapping"):
            found = self.model.encode_as_offset_mapping(text)
            ids, starts = found["ids"], [start for start, _ in found["offsets"]]
        else:  # sentencepiece before 0.2.2
            pieces = self.model.encode_as_immutable_proto(text).pieces
            ids, starts = [p.id for p in pieces], [p.begin for p in pieces]
        assert ids == tokens, "tokens must be the result of encode"
        return starts


class HuggingFaceTokenizer(Tokenizer):
    BOS_NAMES = (
        "<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]", "<|startoftext|>",
        "<|im_start|>", "[CLS]", "<|endoftext|>",
    )  # fmt: skip
    EOS_NAMES = (
        "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|endoftext|>",
        "<|im_end|>", "[SEP]",
    )  # fmt: skip

    def __init__(self, path: Path) -> None:
        tokenizers = import_optional("tokenizers", extra="", needed_by="data.tokenizer.name=hf")
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise UserError(
                f"data.tokenizer.path={path} is not a tokenizer.json: {error}"
            ) from error
        self.model.encode_special_tokens = True  # "<s>" in a document is text, not a token
        self.model.no_padding()
        self.model.no_truncation()
        self.model.post_processor = None  # adds nothing here, but may trim blanks from offsets
        decoder = self.model.decoder
        self.has_byte_tokens = decoder is not None and b"ByteFallback" in decoder.__getstate__()
        vocab = self.model.get_vocab(with_added_tokens=True)
        self._hints: dict[str, str] = {}
        self.bos_id = self._find_special("bos", path, vocab)
        self.eos_id = self._find_special("eos", path, vocab)
        ids = {*vocab.values(), self.bos_id, self.eos_id} - {-1}
        self.n_words = max(ids) + 1
        self.gaps = sorted(set(range(self.n_words)) - ids)
        # They may be in the file without being marked as special.
        ours = {self.bos_id, self.eos_id}
        self.model.add_special_tokens([name for name, token in vocab.items() if token in ours])
        added = self.model.get_added_tokens_decoder().items()
        # without the unknown token
        self.special_ids = {i for i, t in added if t.special} - {self._find_unknown()}

    def _find_unknown(self) -> int | None:
        """Return the id that the model gives to text that it does not know."""
        model = self.model.model
        if not hasattr(model, "unk_token"):  # Unigram
            return json.loads(model.__getstate__()).get("unk_id")
        return None if model.unk_token is None else model.token_to_id(model.unk_token)

    def _find_special(self, role: str, path: Path, vocab: dict[str, int]) -> int:
        """Return the id of the declared token, else of one with a usual name; -1 if none."""
        declared = read_specials(path)
        if role not in declared:
            usual = self.BOS_NAMES if role == "bos" else self.EOS_NAMES
            self._hints[role] = f", or name {role} in {CONFIG_NAME} (looked for {' '.join(usual)})"
            return next((vocab[name] for name in usual if name in vocab), -1)
        token = declared[role]
        if token is None:
            self._hints[role] = f" ({path.parent} declares none)"
            return -1
        by_name = read_added_tokens(path) | vocab
        if token in by_name:
            return by_name[token]
        if token in by_name.values():
            return int(token)
        self._hints[role] = f" ({path.parent} declares {token!r}, which is not in {path.name})"
        warn_once(f"the tokenizer has no {role} token{self._hints[role]}")
        return -1

    def _hint(self, role: str) -> str:
        return self._hints.get(role, "")

    def _encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def _encoding(self, text: str) -> Any:
        encoding = self.model.encode(text, add_special_tokens=False)
        if self.special_ids.isdisjoint(encoding.ids):
            return encoding
        return self._without_specials.encode(text, add_special_tokens=False)

    @cached_property
    def _without_specials(self) -> Any:
        """The same tokenizer, in which no text matches a special token.

        Unigram and word-level models find "</s>" in a text by its name in their vocabulary. Here
        these names start with a code point that no text contains.
        """
        content = json.loads(self.model.to_str())
        hidden = {}
        for token in content["added_tokens"]:
            if token["id"] in self.special_ids:
                hidden[token["content"]] = token["content"] = f"\U0010ffff{token['content']}"
        vocab = content["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = {hidden.get(name, name): token for name, token in vocab.items()}
        else:
            vocab = [(hidden.get(name, name), score) for name, score in vocab]
        content["model"]["vocab"] = vocab
        model = type(self.model).from_str(json.dumps(content))
        model.encode_special_tokens = True
        return model

    def _decode(self, tokens: list[int]) -> str:
        text = self.model.decode(tokens, skip_special_tokens=False)
        if self.has_byte_tokens and "\ufffd" in text:
            # The library replaces a whole run of bytes if one of them is invalid.
            names = map(self.model.id_to_token, tokens)
            text = self.model.decoder.decode(join_byte_tokens(name for name in names if name))
        return text

    def _token_starts(self, text: str, tokens: list[int]) -> list[int]:
        encoding = self._encoding(text)
        assert encoding.ids == tokens, "tokens must be the result of encode"
        return [start for start, _ in encoding.offsets]


# name -> (class, file name inside a folder; None: no file)
TOKENIZERS: dict[str, tuple[Any, str | None]] = {
    "bytes": (ByteTokenizer, None),
    "tiktoken": (TikTokenTokenizer, "tokenizer.model"),
    "sp": (SentencePieceTokenizer, "tokenizer.model"),
    "hf": (HuggingFaceTokenizer, "tokenizer.json"),
}


def build_tokenizer(name: str, path: str | None = None) -> Tokenizer:
    cls, _ = TOKENIZERS[TokenizerArgs(name, path).name]
    file = find_tokenizer_file(name, path)
    return cls() if file is None else cls(file)


def find_tokenizer_file(name: str, path: str | None) -> Path | None:
    """Return the file that `build_tokenizer` opens, or None for tokenizers without one."""
    _, file_name = TOKENIZERS[name]
    if file_name is None:
        return None
    if not path:
        raise UserError(f"data.tokenizer.path is not set; {name} needs the path of {file_name}")
    file = Path(path)
    if file.is_dir():
        file = file / file_name
    if not file.is_file():
        advice = f"give the tokenizer's file, or a folder with {file_name}"
        if file.parts[-3:] == ("data", "local", "tokenizer.json"):  # as in 600M/debug.yaml
            advice = f"run python setup/prepare_local_data.py --out {file.parent}, or {advice}"
        raise UserError(
            f"data.tokenizer.path={path}: no file {file} (seen from {Path.cwd()}); {advice}"
        )
    return file


def with_sha256(args: TokenizerArgs) -> TokenizerArgs:
    """Return `args` with the sha256 of the file that `build_tokenizer` opens."""
    file = find_tokenizer_file(args.name, args.path)
    return replace(args, sha256=None if file is None else file_sha256(file))


def declared_specials(name: str, file: Path | None) -> dict[str, str | int] | None:
    """Return the bos and eos tokens that an hf tokenizer's folder declares, or None without any."""
    if name != "hf" or file is None:
        return None
    declared = read_specials(file)
    return {role: token for role, token in declared.items() if token is not None} or None


def read_specials(file: Path) -> dict[str, str | int | None]:
    """Return the text or id of bos and eos, None for "it has none"; undeclared ones are absent.

    Reads tokenizer_config.json, then special_tokens_map.json, next to tokenizer.json.
    """
    declared: dict[str, str | int | None] = {}
    for name in (CONFIG_NAME, SPECIALS_NAME):
        path = file.with_name(name)
        config = read_json_object(path)
        for role in ("bos", "eos"):
            for key, kind in ((f"{role}_token", str), (f"{role}_token_id", int)):
                if key not in config or role in declared:
                    continue
                token = config[key]
                if isinstance(token, dict):  # an AddedToken
                    token = token.get("content", token)
                if token is not None and type(token) is not kind:
                    raise UserError(
                        f"data.tokenizer.path: {path}: {key}={config[key]!r} must be a token's "
                        f"{'text' if kind is str else 'id'}, or null"
                    )
                declared[role] = None if token == "" else token
    return declared


def read_added_tokens(file: Path) -> dict[str, int]:
    """Return the ids of added_tokens_decoder, which may contain more than tokenizer.json."""
    path = file.with_name(CONFIG_NAME)
    added = read_json_object(path).get("added_tokens_decoder") or {}
    try:
        return {token["content"]: int(number) for number, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"data.tokenizer.path: {path}: added_tokens_decoder must map ids to tokens"
        ) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read an optional JSON file next to a tokenizer; {} without one. UserError if malformed."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"data.tokenizer.path: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"data.tokenizer.path: {path} must be a JSON object, not a {type(content).__name__}"
        )
    return content


@cache
def warn_once(message: str) -> None:
    logger.warning(message)


BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def join_byte_tokens(names: Iterable[str]) -> list[str]:
    """Replace each run of byte tokens by its text, in which an invalid byte is U+FFFD."""
    joined: list[str] = []
    for is_byte, run in groupby(names, key=lambda name: bool(BYTE_TOKEN.fullmatch(name))):
        if is_byte:
            content = bytes(int(name[3:5], 16) for name in run)
            joined.append(
                re.sub("[\udc80-\udcff]", "\ufffd", content.decode("utf-8", "surrogateescape"))
            )
        else:
            joined += run
    return joined


def read_mergeable_ranks(path: Path) -> dict[bytes, int]:
    """Read lines of `base64 rank`. tiktoken's own reader would keep a copy in /tmp."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"data.tokenizer.path: {path}:{number} is not `base64 rank`; is this a tiktoken "
                "file? (a SentencePiece model needs data.tokenizer.name=sp)"
            ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"data.tokenizer.path={path}: ranks must run from 0 without gaps")
    return ranks


def well_formed(text: str) -> str:
    """Replace lone surrogates by U+FFFD: JSON allows them, UTF-8 doesn't."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def starts_from_bytes(tokens: list[bytes]) -> list[int]:
    """Return the character in which each token starts, in the text that the tokens join to."""
    starts = []
    n_chars = 0
    for token in tokens:
        is_inside = bool(token) and 0x80 <= token[0] < 0xC0  # starts inside a character
        starts.append(n_chars - is_inside)
        n_chars += sum(not 0x80 <= byte < 0xC0 for byte in token)
    return starts


# a blank after a word, or the first character after a line break
SAFE_CUT = re.compile(r"(?<=\S)(?= )|(?<=[\r\n])(?=\S)")


def split_safely(text: str, limit: int = 400_000) -> Iterator[str]:
    """Split a text into parts of at most `limit` characters: the split rule of tiktoken is slow on
    very long texts.

    No token crosses a match of SAFE_CUT, so the parts give the same tokens as the whole text. Only
    a text without a match within `limit` is cut elsewhere.
    """
    start = 0
    while len(text) - start > limit:
        # one more character, as SAFE_CUT looks ahead by one
        cuts = [m.start() for m in SAFE_CUT.finditer(text, start + 1, start + limit + 1)]
        cut = cuts[-1] if cuts else start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]
