"""Import of models that transformers made: Llama, Qwen2 and Qwen3, as they are or with loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts import export_weights, import_hf
from lingua.errors import UserError
from tests.tolerances import FP32_MODEL, assert_same

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(258, (2, 70), generator=torch.Generator().manual_seed(3))
SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
}
# Contexts in which some of the four pairs keep their frequency, some mix, and some are divided.
THETA = {"rope_theta": 50.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 40},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, **THETA},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
# (class of transformers, options of its config, our expected options)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "TinyLlama": ("Llama", {"num_key_value_heads": 1}, {"attn_bias": "none", "qk_norm": False}),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3}, {}),
    "Llama 3.2, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, {}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **THETA}}, {}),
    "yarn": ("Llama", {"rope_parameters": {**YARN, "beta_fast": 3.0}}, {}),
    "yarn, mscale": (
        "Llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4, "truncate": False}},
        {},
    ),
    "yarn, attention_factor": (
        "Qwen2",
        {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_slow": 0.5}},
        {"attn_bias": "qkv"},
    ),
    "all biases": ("Llama", {"attention_bias": True, "head_dim": 12}, {"attn_bias": "qkvo"}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}, {"attn_bias": "qkv"}),
    "Qwen3": ("Qwen3", {"head_dim": 12}, {"qk_norm": True, "attn_bias": "none"}),
    "Qwen3, biases": ("Qwen3", {"attention_bias": True}, {"qk_norm": True, "attn_bias": "qkvo"}),
}


def save(folder: Path, kind: str = "Llama", **options: Any) -> Any:
    """Save a random model whose every tensor has an effect, in shards; return it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for name, param in model.named_parameters():
        if param.ndim == 1:
            param += 0.3 * torch.randn_like(param)
        elif "layers" in name:
            param *= 8  # with small initial weights, outputs hardly depend on a layer
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def import_(folder: Path, out: Path, *options: str) -> Any:
    import_hf.main([f"hf={folder}", f"out={out}", "tokenizer.name=bytes", *options])
    return load_model_and_tokenizer(str(out), dtype="fp32", device="cpu").model


def decoded(model: Any) -> torch.Tensor:
    """Return the logits of a prefill, a second one, and steps."""
    cache = model.init_cache(*TOKENS.shape)
    parts = [model.prefill(tokens, cache) for tokens in (TOKENS[:, :50], TOKENS[:, 50:66])]
    return torch.cat([*parts, *(model.step(t, cache) for t in TOKENS[:, 66:].split(1, 1))], 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_the_same_here_and_exported_again(name, tmp_path):
    kind, options, ours = MODELS[name]
    theirs = save(tmp_path / "hf", kind, **options)
    want = theirs(TOKENS).logits
    model = import_(tmp_path / "hf", tmp_path / "ours")
    assert vars(model.args).items() >= ours.items()
    assert_same(model(TOKENS), want, 1e-5)
    assert_same(decoded(model), want, 1e-5)

    out = tmp_path / "again"
    export_weights.main([f"ckpt={tmp_path / 'ours'}", f"out={out}", "format=hf"])
    again, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(again) is type(theirs) and not any(info.values()), info
    with torch.no_grad():
        assert_same(again(TOKENS).logits, want, FP32_MODEL)
    weights = theirs.state_dict()
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[n]) for n, tensor in again.state_dict().items())


# ---- a looped model from some of the layers


@pytest.mark.parametrize(
    "options, kept",
    [(["layers=[0, 4, 1]"], [0, 4, 1]), (["n_layers=3"], [0, 2, 4]), ([], [0, 1, 2, 3, 4])],
)
def test_a_looped_model_starts_as_the_kept_layers(options, kept, tmp_path, capsys):
    theirs = save(tmp_path / "hf", "Qwen2", num_hidden_layers=5, tie_word_embeddings=True)
    model = import_(tmp_path / "hf", tmp_path / "ours", "loop_count=3", *options)
    said = capsys.readouterr().out
    assert ", ".join(f"{i} <- {layer}" for i, layer in enumerate(kept)) in said
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in said
    assert f"hf: {sum(p.numel() for p in theirs.parameters()):,}" in said
    assert model.rho.shape == (3, 32) and not model.rho.any()
    once = load_model_and_tokenizer(
        str(tmp_path / "ours"), dtype="fp32", device="cpu", loop_count=1
    ).model
    layers = [theirs.model.layers[i] for i in kept]
    for ours, n_loops in ((once, 1), (model, 3)):
        theirs.model.layers = torch.nn.ModuleList(layers * n_loops)
        theirs.config.num_hidden_layers = len(kept) * n_loops
        theirs.config.layer_types = ["full_attention"] * len(kept) * n_loops
        assert_same(ours(TOKENS), theirs(TOKENS, use_cache=False).logits, FP32_MODEL)


def test_fewer_layers_without_loops_have_no_gates(tmp_path):
    save(tmp_path / "hf")
    model = import_(tmp_path / "hf", tmp_path / "ours", "n_layers=1")
    assert model.rho is None and len(model.layers) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["layers=[0, 2]"], r"layers=\[0, 2\] must be layers of hf, from 0 to 1"),
        (["layers=[]"], r"layers=\[\] must be"),
        (["n_layers=3"], "n_layers=3 must be from 1 to 2"),
        (["n_layers=1", "layers=[0, 1]"], r"n_layers=1 contradicts layers=\[0, 1\]"),
        (["loop_count=0"], "loop_count=0 must be at least 1"),
    ],
)
def test_layers_that_cannot_be_kept(options, message, tmp_path):
    save(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        import_(tmp_path / "hf", tmp_path / "ours", *options)
    assert not (tmp_path / "ours").exists()
