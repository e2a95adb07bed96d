"""Weights leave a run and come back, and a Llama is the same model here and in transformers."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from apps.LT2.load import load_model_and_tokenizer
from apps.LT2.scripts import export_weights, import_hf
from lingua.optim import is_matrix
from tests.LT2.tiny import save_run, tiny_model
from tests.tolerances import FP32_MODEL, assert_same

transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[256, *b"what is asked"]])
LLAMA = {"use_residual": False, "n_heads": 4, "norm_eps": 1e-3, "rope_theta": 500.0}


def export(ckpt, out, form, **options):
    options = {"ckpt": ckpt, "out": out, "format": form, **options}
    export_weights.main([f"{name}={value}" for name, value in options.items()])
    return out


def import_(folder, out, *options):
    import_hf.main([f"hf={folder}", f"out={out}", *options])
    return out


def load(ckpt, **options):
    return load_model_and_tokenizer(str(ckpt), dtype="fp32", device="cpu", **options)


def sharp(model):
    """Attention that depends on positions, and norms whose weights are seen."""
    for name, param in model.named_parameters():
        if "norm" in name:
            param += 0.3 * torch.randn_like(param)
        elif ".wq." in name or ".wk." in name or "q_proj" in name or "k_proj" in name:
            param *= 3
    return model


def llama_run(folder, **changes):
    model = sharp(tiny_model("full", 1, **{**LLAMA, **changes}))
    return save_run(folder, model), model


# ---- our own formats


@pytest.mark.parametrize("form", ["consolidated", "safetensors"])
@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
def test_exported_weights_are_the_run_without_its_optimizer(form, kind, tmp_path):
    model = tiny_model(kind, 2)
    save_run(tmp_path / "run", model)
    out = export(tmp_path / "run", tmp_path / "out", form)
    file = out / export_weights.FILES[form]
    assert {p.name for p in out.iterdir()} == {file.name, "params.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"run", "out"}
    for ckpt in (out, file):
        assert torch.equal(load(ckpt).model(TOKENS), model(TOKENS))
    again = export(file, tmp_path / "again", "safetensors")
    state = load_file(again / "model.safetensors")
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


def test_a_narrow_export_keeps_vectors_in_fp32(tmp_path):
    model = tiny_model("hybrid", 2)
    save_run(tmp_path / "run", model)
    out = export(tmp_path / "run", tmp_path / "out", "safetensors", dtype="bf16")
    for name, tensor in load_file(out / "model.safetensors").items():
        wanted = torch.bfloat16 if is_matrix(name, tensor) else torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(wanted)), name


def test_what_torch_makes_of_a_step_folder_loads(tmp_path):
    model = tiny_model("hybrid", 2)
    step = save_run(tmp_path / "run", model)
    dcp_to_torch_save(step, tmp_path / "all.pth")
    shutil.copy(step / "params.json", tmp_path)
    assert torch.equal(load(tmp_path / "all.pth").model(TOKENS), model(TOKENS))


# ---- Hugging Face


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_an_exported_llama_is_the_same_model_in_transformers(n_kv_heads, tied, tmp_path):
    _, model = llama_run(tmp_path / "run", n_kv_heads=n_kv_heads, weight_tying=tied)
    out = export(tmp_path / "run", tmp_path / "hf", "hf")
    llama, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_same(llama(TOKENS).logits, model(TOKENS), FP32_MODEL)

    back = load(import_(out, tmp_path / "back", "tokenizer.name=bytes"))
    assert torch.equal(back.model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}, {"head_dim": 12, "ffn": 101}])
def test_an_imported_llama_is_the_same_model_here(shape, tied, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=shape.get("ffn", 48),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=shape.get("n_kv_heads", 2),
        head_dim=shape.get("head_dim"),
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
    )
    llama = sharp(transformers.LlamaForCausalLM(config).eval().requires_grad_(False))
    for param in llama.model.layers.parameters():
        param *= 5  # far from the small initial weights, under which little depends on a layer
    # in parts, as large models come
    llama.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    ours = load(import_(tmp_path / "hf", tmp_path / "ours", "tokenizer.name=bytes")).model
    assert_same(ours(TOKENS), llama(TOKENS).logits, FP32_MODEL)
