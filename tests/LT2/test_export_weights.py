"""Test export and import of weights; a Llama has equal logits here and in transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts import export_weights, import_hf
from apps.LT2.train import build_model
from apps.LT2.training.args import validate_train_args
from apps.LT2.transformer import build_on_meta
from lingua.checkpointing.weights import load_initial_weights
from lingua.errors import UserError
from lingua.optim import is_matrix
from tests.LT2.tiny import save_run, tiny_model
from tests.LT2.tiny_run import train, train_args, write_corpus
from tests.tolerances import FP32_MODEL, assert_same

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

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
    """Make attention depend on positions, and norm weights differ from 1."""
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
    state = safetensors.load_file(again / "model.safetensors")
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


def test_a_narrow_export_keeps_vectors_in_fp32(tmp_path):
    model = tiny_model("hybrid", 2)
    save_run(tmp_path / "run", model)
    out = export(tmp_path / "run", tmp_path / "out", "safetensors", dtype="bf16")
    for name, tensor in safetensors.load_file(out / "model.safetensors").items():
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
        param *= 5  # with small initial weights, outputs hardly depend on a layer
    # sharded, like large models
    llama.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    ours = load(import_(tmp_path / "hf", tmp_path / "ours", "tokenizer.name=bytes")).model
    assert_same(ours(TOKENS), llama(TOKENS).logits, FP32_MODEL)


def test_a_narrow_llama_has_one_dtype(tmp_path):
    llama_run(tmp_path / "run")
    out = export(tmp_path / "run", tmp_path / "hf", "hf", dtype="bf16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = safetensors.load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_what_old_versions_wrote_of_a_llama_is_read(tmp_path):
    """Old folders have rope_theta at the top level, rotary frequencies, and the tied head."""
    _, model = llama_run(tmp_path / "run", weight_tying=True)
    out = export(tmp_path / "run", tmp_path / "hf", "hf")
    config = json.loads((out / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (out / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    tensors = safetensors.load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.save_file(tensors, out / "model.safetensors")
    back = load(import_(out, tmp_path / "back", "tokenizer.name=bytes"))
    assert torch.equal(back.model(TOKENS), model(TOKENS))


# ---- tokenizers


@pytest.fixture
def tokenizer_file(tmp_path):
    """A tokenizer.json with another name, whose bos is only in tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<start>": 0, "</s>": 1, "what": 2, "is": 3, "asked": 4, "<unk>": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<start>", "</s>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    model.save(str(folder / "mine.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<start>"}')
    return folder / "mine.json"


def test_a_tokenizer_goes_along_and_the_folder_may_move(tokenizer_file, tmp_path):
    model = tiny_model("full", 1, **LLAMA)
    data = {"tokenizer": {"name": "hf", "path": str(tokenizer_file)}}
    save_run(tmp_path / "run", model, data=data)
    own = export(tmp_path / "run", tmp_path / "own", "safetensors")
    hf = export(tmp_path / "run", tmp_path / "hf", "hf")
    back = import_(hf, tmp_path / "back")
    shutil.rmtree(tokenizer_file.parent)
    for folder in (own, back):
        moved = folder.rename(folder.with_name("moved_" + folder.name))
        tokenizer = load(moved).tokenizer
        assert tokenizer.encode("what is", True, False) == [0, 2, 3]
    config = json.loads((hf / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


def test_transformers_reads_the_tokenizer_as_we_do(tokenizer_file, tmp_path):
    tokenizer_file.write_text(tokenizer_file.read_text().replace("<start>", "<s>"))
    tokenizer_file.with_name("tokenizer_config.json").unlink()
    data = {"tokenizer": {"name": "hf", "path": str(tokenizer_file)}}
    save_run(tmp_path / "run", tiny_model("full", 1, **LLAMA), data=data)
    hf = export(tmp_path / "run", tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    assert theirs.encode("what is asked", add_special_tokens=False) == [2, 3, 4]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("theirs_adds", [True, False])
def test_texts_start_with_bos_there_if_they_do_here(add_bos, theirs_adds, tokenizer_file, tmp_path):
    if theirs_adds:
        tokenizers = pytest.importorskip("tokenizers")
        file = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        file.post_processor = tokenizers.processors.TemplateProcessing(
            single=["<start>", "$A"], special_tokens=[("<start>", 0)]
        )
        file.save(str(tokenizer_file))
    data = {"tokenizer": {"name": "hf", "path": str(tokenizer_file)}, "add_bos": add_bos}
    save_run(tmp_path / "run", tiny_model("full", 1, **LLAMA), data=data)
    hf = export(tmp_path / "run", tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    assert theirs.encode("what is") == [0] * add_bos + [2, 3]
    assert load(import_(hf, tmp_path / "back")).config["data"]["add_bos"] == add_bos


# ---- bad input


@pytest.mark.parametrize(
    "changes",
    [
        {"loop_count": 2},
        {"mixer": "gdn", "attention_pattern": "2:1"},
        {"sliding_window": 5},
        {"gated_attn": True},
        {"use_residual": True},
    ],
)
def test_other_models_are_no_llama(changes, tmp_path):
    options = {"loop_count": 1, **LLAMA, **changes}
    save_run(tmp_path / "run", tiny_model("full", **options))
    out = export(tmp_path / "run", tmp_path / "out", "hf")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LT2ForCausalLM"]


def test_a_gate_that_stayed_zero_is_no_obstacle(tmp_path):
    model = tiny_model("full", 1, **{**LLAMA, "use_residual": True})
    model.rho.zero_()
    save_run(tmp_path / "run", model)
    hf = export(tmp_path / "run", tmp_path / "hf", "hf")
    back = load(import_(hf, tmp_path / "back", "tokenizer.name=bytes"))
    assert torch.equal(back.model(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ckpt": "nowhere"}, "ckpt=nowhere: no such file"),
        ({"format": "onnx"}, "format=onnx must be one of consolidated, safetensors, hf"),
        ({"dtype": "auto"}, "dtype=auto must be one of fp32"),
        ({"out": "run"}, "out=run "),
        ({"out": "file"}, "out=file "),
        ({"out": "file/below"}, "out=file/below"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    options = {"ckpt": "run", "out": "out", "form": "consolidated", **options}
    options["form"] = options.pop("format", options["form"])
    with pytest.raises(UserError, match=message):
        export(**options)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "file"}
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    _, model = llama_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    out = export(tmp_path / "run", tmp_path / "out", "consolidated")
    assert torch.equal(load(out).model(TOKENS), model(TOKENS))


def test_a_half_written_file_is_told(tmp_path):
    llama_run(tmp_path / "run")
    for form, name in export_weights.FILES.items():
        file = export(tmp_path / "run", tmp_path / form, form) / name
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(UserError, match="not readable"):
            if form == "hf":
                import_(tmp_path / form, tmp_path / "out", "tokenizer.name=bytes")
            else:
                load(file)
    assert not (tmp_path / "out").exists()


def config(**changes):
    def spoil(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def without_a_tensor(folder):
    tensors = safetensors.load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    safetensors.save_file(tensors, folder / "model.safetensors")


def only_pickles(folder):
    """Replace the weights by a pickle that fails if it is loaded."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\n_exit\n(I9\ntR.")


def index(**files):
    def spoil(folder):
        only_pickles(folder)
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": files}))

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (config(model_type="mistral"), "model_type=mistral is not supported, only llama or qwen2"),
        (
            config(attention_bias=True),
            r"tensors .*\(12\), such as model.layers.0.self_attn.k_proj.bias",
        ),
        (config(mlp_bias=True), "mlp_bias=True"),
        (config(hidden_act="gelu"), "hidden_act=gelu"),
        (config(rope_parameters={"rope_type": "longrope"}), "rope_scaling.*=longrope"),
        (config(rope_scaling={"type": "linear"}), "rope_scaling.factor is not set"),
        (config(use_sliding_window=True), "use_sliding_window=True"),
        (config(layer_types=["sliding_attention"] * 3), "use_sliding_window=True"),
        (config(quantization_config={"bits": 4}), "quantization_config="),
        (config(vocab_size=100), "tokenizer.name=bytes has 258 .* 100"),
        (config(num_hidden_layers=2), r"tensors .*\(9\), such as model.layers.2"),
        (config(intermediate_size=64), "does not fit the model: .*feed_forward"),
        (config(hidden_size="x"), "config.json: hidden_size=x "),
        (config(hidden_size=0), "hidden_size=0 must be"),
        (config(num_hidden_layers=None), "num_hidden_layers=None must be"),
        (config(rms_norm_eps="x"), "config.json: norm_eps=x: expected float"),
        (without_a_tensor, r"tensors .*\(1\), such as model.layers.2.mlp.up_proj"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not readable"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type=None"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors and no"),
        (only_pickles, "pickles such as pytorch_model.bin are not loaded"),
        (index(a="part.safetensors"), "part.safetensors, a part of the weights, is missing"),
        (index(a="pytorch_model.bin"), "names pytorch_model.bin, not a .safetensors"),
        (index(a="../model.safetensors"), "names ../model.safetensors, not"),
        (index(), "tensors are missing"),
    ],
)
def test_hugging_face_folders_that_are_refused(spoil, message, tmp_path):
    llama_run(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "hf", "hf")
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        import_(folder, tmp_path / "out", "tokenizer.name=bytes")
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "hf"}


def test_a_hugging_face_folder_is_no_checkpoint_yet(tmp_path):
    llama_run(tmp_path / "run")
    folder = export(tmp_path / "run", tmp_path / "hf", "hf")
    with pytest.raises(UserError, match=f"import_hf hf={folder}"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="tokenizer.path=.*no file .*tokenizer.json"):
        import_(folder, tmp_path / "out")
    with pytest.raises(UserError, match="hf=org/name: no such folder; .* hf download"):
        import_("org/name", tmp_path / "out")


def test_a_training_run_starts_from_exported_weights(tmp_path):
    trained = train(write_corpus(tmp_path / "data"), tmp_path / "run", steps=2)
    out = export(trained, tmp_path / "out", "safetensors")
    args = train_args(tmp_path / "data", tmp_path / "new", **{"checkpoint.init_ckpt_path": out})
    args = validate_train_args(args)
    model = build_on_meta(args.model)
    build_model(args, None, torch.device("cpu"), model)
    load_initial_weights(str(out), model)
    got = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    want = safetensors.load_file(out / "model.safetensors")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_options_of_training_loops_that_a_folder_lacks_are_named(tmp_path, caplog):
    save_run(tmp_path / "run", tiny_model("full", 2, loop_sample="uniform:1,2"))
    export(tmp_path / "run", tmp_path / "hf", "hf")
    assert "model.loop_sample=uniform:1,2" in caplog.text and "loop_schedule" not in caplog.text


def test_sigterm_leaves_no_temporary_folder(tmp_path, monkeypatch):
    save_run(tmp_path / "run", tiny_model("full", 1))
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        export_weights, "write_weights", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    try:
        with pytest.raises(SystemExit, match="143"):
            export(tmp_path / "run", tmp_path / "out", "safetensors")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
