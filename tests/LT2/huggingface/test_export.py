"""An exported folder is our model in transformers: logits, generation, loops, files."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from apps.LT2.huggingface import export as export_module
from apps.LT2.huggingface.bundle import bundle
from apps.LT2.huggingface.export import MODELING
from apps.LT2.mixers import MIXERS
from apps.LT2.scripts import export_weights
from lingua.optim import is_matrix
from tests.lingua.stool_utils import limited_files
from tests.LT2.tiny import save_run, tiny_model
from tests.tolerances import FP32_MODEL, assert_same

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
get_imports = transformers.dynamic_module_utils.get_imports

from tests.LT2.huggingface.exported import export, generate, greedy, load, modeling, tokens  # noqa: E402, I001

CASES = {
    **{mixer: (mixer, {}) for mixer in MIXERS},
    "4:1": ("hybrid", {"n_layers": 5, "attention_pattern": "4:1"}),
    "bookend": ("hybrid", {"attention_pattern": "bookend:1"}),
    "gdn+dsa": ("gdn+dsa", {}),
    "windows": ("full", {"attention_pattern": "3->6"}),
    "families": ("full", {"n_layers": 2, "attention_pattern": "gdn,full->5,gdn"}),
    "random": ("window", {"attention_pattern": "random:2:1", "default_sliding_window": 4}),
    "tied": ("gdn", {"weight_tying": True, "use_residual": False}),
    "gated": ("full", {"gated_attn": True, "n_kv_heads": 1}),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_runs_the_model_as_we_do(case, tmp_path):
    kind, changes = CASES[case]
    ours, theirs = export(tmp_path, kind, **changes)
    x = tokens(2, 21)
    logits = theirs(x).logits
    assert_same(logits, ours(x), FP32_MODEL)
    assert torch.equal(generate(theirs, x, 4), greedy(ours, x, 4))
    # a left-padded batch equals its single prompts, in logits and tokens
    mask = torch.ones_like(x)
    mask[1, :12] = 0
    padded = theirs(x * mask, attention_mask=mask).logits
    assert_same(padded[1, 12:], theirs(x[1:, 12:]).logits[0], FP32_MODEL)
    new = generate(theirs, x * mask, 4, attention_mask=mask)
    assert torch.equal(new, torch.cat([greedy(ours, x[:1], 4), greedy(ours, x[1:, 12:], 4)]))
    # a prompt in two parts
    past = theirs(x[:, :9]).past_key_values
    assert_same(theirs(x[:, 9:], past_key_values=past).logits, logits[:, 9:], FP32_MODEL)


def test_a_full_disk_names_the_file(tmp_path):
    with limited_files(100_000), pytest.raises(OSError, match=MODELING):
        export(tmp_path, "full")
    assert not (tmp_path / f"{MODELING}.py").exists()


@torch.no_grad()
def test_another_number_of_loops(tmp_path):
    kind = "hybrid"
    _, theirs = export(tmp_path, kind)
    x = tokens(2, 9)
    for loops in (1, 4):
        ours = tiny_model(kind, 2)
        other = tiny_model(kind, loops)
        state = ours.state_dict()
        state["rho"] = state["rho"][[min(t, 1) for t in range(loops)]]
        other.load_state_dict(state)
        assert_same(theirs(x, loop_count=loops).logits, other(x), FP32_MODEL)
        assert torch.equal(generate(theirs, x, 4, loop_count=loops), greedy(other, x, 4))
        loaded = load(tmp_path, loop_count=loops)
        assert_same(loaded(x).logits, other(x), FP32_MODEL)
        loaded.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again", loop_count=2)
        assert torch.equal(again(x).logits, theirs(x).logits)  # no gate is lost
    with pytest.raises(ValueError, match="loop_count=1"):
        theirs(x[:, :1], past_key_values=theirs(x).past_key_values, loop_count=1)


def test_a_pattern_for_each_loop_fixes_their_number(tmp_path):
    _, theirs = export(tmp_path, "full", attention_pattern="3->6")
    with pytest.raises(ValueError, match="attention_pattern"):
        theirs(tokens(1, 4), loop_count=3)


def test_the_modelling_file_needs_torch_and_transformers_only():
    module = modeling()
    imports = set(get_imports(module.__file__))  # as transformers checks them
    assert imports - set(sys.stdlib_module_names) == {"torch", "transformers"}
    homes = {getattr(value, "__module__", None) or "" for value in vars(module).values()}
    assert not {home for home in homes if home.startswith(("apps", "lingua"))}


@torch.no_grad()
def test_the_command_writes_a_folder_for_auto_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    model = tiny_model("hybrid", 2)
    save_run(tmp_path / "run", model)
    out = tmp_path / "out"
    export_weights.main([f"ckpt={tmp_path / 'run'}", f"out={out}", "format=hf"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    x = tokens(1, 9)
    assert_same(theirs(x).logits, model(x), FP32_MODEL)
    base = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(base(x).last_hidden_state, theirs.model(x).last_hidden_state)
    # saved again, the folder has the code too
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_lt2.py").read_text() == bundle()
    assert torch.equal(load(tmp_path / "again")(x).logits, theirs(x).logits)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_lt2.LT2ForCausalLM"
    assert config["layout"] == [["gdn", "gdn", "full"]] * 2
    assert (config["eos_token_id"], config["hidden_size"]) == (257, 32)


def test_large_weights_are_split_among_files(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "MAX_SHARD", 40_000)
    ours, theirs = export(tmp_path, "hybrid")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 3 and all(file.stat().st_size < 45_000 for file in files)
    weights = {export_module.from_hf_name(n): w for n, w in theirs.state_dict().items()}
    torch.testing.assert_close(weights, dict(ours.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["kda", "mamba2", "gla", "dsa"])
def test_a_narrow_model_keeps_vectors_in_fp32(kind, tmp_path):
    export(tmp_path, kind)
    narrow = load(tmp_path, dtype=torch.bfloat16)
    for name, param in narrow.named_parameters():
        wanted = torch.bfloat16 if is_matrix(name, param) else torch.float32
        assert param.dtype == wanted, name
    assert generate(narrow, tokens(2, 9), 4).shape == (2, 4)
