"""Random texts with what tokenizers get wrong."""

from __future__ import annotations

import random
from unicodedata import category

ASSIGNED = [chr(c) for c in range(0x30000) if category(chr(c)) not in ("Cn", "Co", "Cs")]
LOOK_ALIKES = [
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<0x41>", "▁", "[UNK]", "[CLS]"),
    *("<sep>", "<ctl>", "<|begin_of_text|>", "<|im_end|>", "<|eot_id|>"),
    "<|reserved_special_token_0|>",
]
SOURCES = [
    ASSIGNED,
    [c for c in ASSIGNED if category(c)[0] == "M"],
    [chr(c) for c in range(128)],
    list(" \t\n\r\x0b\x00\x01\x7f\u00a0\u2028\u3000") + ["\r\n"],
    LOOK_ALIKES,
    ["the", " list", "function ", "return x", "aa", "123", "if (a):\n\t", "isn't", "  "],
    list("Zäöüßé日本語🙂👍🏽\u200d각가"),
]


def random_text(rng: random.Random) -> str:
    """Return up to 60 parts from three of SOURCES, some of them repeated."""
    sources = rng.choices(SOURCES, k=3)
    n = rng.choice([0, 1, 2, 5, 20, 60])
    return "".join(rng.choice(rng.choice(sources)) * rng.choice([1, 1, 1, 2, 17]) for _ in range(n))
