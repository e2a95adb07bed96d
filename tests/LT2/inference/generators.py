"""Generators for tests."""

from __future__ import annotations

from typing import Any

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from lingua.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id
UNTIL = [chr(c) for c in range(0, 128, 4)]  # every fourth byte, so answers differ in length


class EndlessTokenizer(ByteTokenizer):
    """Has no EOS, so every answer has the maximum length."""

    def __init__(self):
        super().__init__()
        self.eos_id = -1


def make_generator(model: Any, **options: Any) -> PackedCausalTransformerGenerator:
    cfg = PackedCausalTransformerGeneratorArgs(**{"max_gen_len": 8, "max_tokens": 1000, **options})
    return PackedCausalTransformerGenerator(cfg, model, TOKENIZER)
