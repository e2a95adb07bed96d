"""Exported folders of tiny models, loaded by the code in them."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apps.LT2.huggingface.bundle import bundle
from apps.LT2.huggingface.export import write_model
from apps.LT2.transformer import LoopedTransformer
from tests.LT2.tiny import tiny_model


@functools.cache
def modeling() -> ModuleType:
    """Import the bundled file as a separate module, as transformers does."""
    file = Path(tempfile.mkdtemp()) / "exported_modeling_lt2.py"
    file.write_text(bundle(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(folder, kind: str, loop_count: int = 2, **changes: Any):
    """Export a tiny model; return it as ours and as loaded from the folder."""
    ours = tiny_model(kind, loop_count, **changes)
    folder.mkdir(exist_ok=True)
    tokens = {"bos_token_id": 256, "eos_token_id": 257}
    write_model(folder, ours.args, ours.state_dict(), dtype=torch.float32, tokens=tokens)
    return ours, load(folder)


def load(folder, **options: Any):
    return modeling().LT2ForCausalLM.from_pretrained(folder, **options).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(sum(shape)))


def greedy(model: LoopedTransformer, prompt: Tensor, n: int) -> Tensor:
    """Return n new tokens of our greedy decoding, for each row of the prompt."""
    cache = model.init_cache(len(prompt), prompt.shape[1] + n)
    logits, new = model.prefill(prompt, cache, last_only=True), []
    for _ in range(n):
        new.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = model.step(new[-1], cache)
    return torch.cat(new, 1)


def generate(model: Any, prompt: Tensor, n: int, **options: Any) -> Tensor:
    """Return n new tokens of transformers' generate, greedy by default."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(prompt, max_new_tokens=n, **options)[:, prompt.shape[1] :]
