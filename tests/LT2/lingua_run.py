"""A run folder as Meta Lingua writes it, and Lingua's model in our own code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import AdamW

from lingua.transformer import BaseTransformer, BaseTransformerArgs, RMSNorm, TiedLinear

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 2, "multiple_of": 16, "max_seqlen": 32}
VOCAB = 258  # of the tokenizer `bytes`

# The state of the data loader, and its parts, have these fields in Lingua.
JSONL = {"position": 0, "block_size": 1, "offset": 0, "current_iter": 0}
RNG = {"bit_generator": "PCG64", "state": {"state": 1, "inc": 3}, "has_uint32": 0, "uinteger": 0}


class LinguaModel(BaseTransformer):
    def __init__(self, *, weight_tying: bool):
        super().__init__(BaseTransformerArgs(**SHAPE))
        self.tok_embeddings = nn.Embedding(VOCAB, SHAPE["dim"])
        self.norm = RMSNorm(SHAPE["dim"], self.args.norm_eps)
        tied = TiedLinear(self.tok_embeddings)
        self.output = tied if weight_tying else nn.Linear(SHAPE["dim"], VOCAB, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.output(self.norm(self.forward(self.tok_embeddings(tokens))))


def params(root_dir: Path, *, weight_tying: bool) -> dict[str, Any]:
    """Return the parts of Lingua's params.json that differ from ours, and those that are read."""
    model = {**SHAPE, "head_dim": None, "n_kv_heads": None, "ffn_dim_multiplier": None}
    model |= {"norm_eps": 1e-5, "rope_theta": 10000.0, "init_base_std": None, "seed": 42}
    model |= {"init_std_factor": "disabled", "vocab_size": VOCAB, "sliding_window": None}
    data = {"root_dir": str(root_dir), "sources": {"text": 1.0}, "batch_size": 2, "seq_len": 32}
    data |= {"n_views": 2, "seed": 42, "add_bos": True, "add_eos": True, "load_async": True}
    data |= {"prefetch_size": 64, "tokenizer": {"name": "bytes", "path": None}}
    distributed = {"model_dtype": "bf16", "float8_recipe": None, "compile_cache_size_limit": 8}
    return {
        "name": "lingua",
        "model": model | {"weight_tying": weight_tying},
        "data": data,
        "optim": {"lr": 3e-4, "annealing_step": 1000},
        "distributed": distributed,
        "eval": None,
    }


def data_state(root_dir: Path) -> dict[str, Any]:
    file = str(root_dir / "text" / "text.chunk.00.jsonl")
    source = {"file_path": file, **JSONL}
    choice = {"root_dir": str(root_dir), "sources": {"text": 1.0}, "rng_state": RNG}
    choice["source_to_state"] = {"text": source}
    tokens = {"it_state": choice, "name": "bytes", "add_bos": True, "add_eos": True, "path": None}
    packing = {"it_state": tokens, "start_token": 0, "output_seq_len": 32, "n_views": 2}
    packing["seq_len"] = 0
    block = {"seq_idx": 0, "rng_state": RNG, "prefetch_size": 64, "batch_size": 2}
    return {"it_state": packing, **block}


def write_lingua_run(dump_dir: Path, root_dir: Path, *, weight_tying: bool = False) -> LinguaModel:
    """Write a run with one checkpoint, of step 2, and return its model."""
    torch.manual_seed(0)
    model = LinguaModel(weight_tying=weight_tying)
    model.init_weights()
    nn.init.normal_(model.tok_embeddings.weight, std=0.3)
    optimizer = AdamW(model.parameters())
    model.logits(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    if weight_tying:  # Lingua's TiedLinear registers the embedding again
        weights["output.tied_module.weight"] = weights["tok_embeddings.weight"]

    folder = dump_dir / "checkpoints" / "0000000002"
    with warnings.catch_warnings(action="ignore"):  # of a process without a group
        dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder, no_dist=True)
    config = params(root_dir, weight_tying=weight_tying)
    scheduler = {"base_lrs": [3e-4], "last_epoch": 2, "_step_count": 3, "lr_lambdas": [None]}
    state = {"step": 2, "acc_step": 0, "data_loader_state": data_state(root_dir)}
    (folder / "params.json").write_text(json.dumps(config))
    (folder / "train_state_00000.json").write_text(json.dumps(state | {"scheduler": scheduler}))
    (dump_dir / "config.yaml").write_text(json.dumps(config))
    (dump_dir / "metrics.jsonl").write_text(json.dumps({"global_step": 2, "loss/out": 5.0}) + "\n")
    return model.requires_grad_(False)
