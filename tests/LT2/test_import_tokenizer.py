"""Import of a Hugging Face folder whose tokenizer and embedding differ in size."""

from __future__ import annotations

import json

import pytest
import torch

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts import export_weights, import_hf
from lingua.errors import UserError
from lingua.tokenizer import build_tokenizer
from tests.lingua.tokenizer_kinds import TOKENIZER_KINDS

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "the function <fill> <call> returns"


def hf_folder(tmp_path, kind="byte-level", extra_rows=0, added=(), **config):
    """Save a Llama with one row for each token, and add tokens to its tokenizer afterwards."""
    folder = tmp_path / "hf"
    folder.mkdir()
    n_rows = build_tokenizer(*TOKENIZER_KINDS[kind](folder)).n_words + extra_rows
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=n_rows, **shape, **heads)
    )
    llama.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=t != "<call>") for t in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, n_rows


def import_and_generate(folder, out):
    """Generate here, and in transformers from an export; return the tokenizer and all tokens."""
    import_hf.main([f"hf={folder}", f"out={out}"])
    saved = json.loads((out / "params.json").read_text())["data"]["tokenizer"]
    assert saved["path"] == str(out / "tokenizer.json"), "not that of the folder hf"
    loaded = load_model_and_tokenizer(str(out), dtype="fp32", device="cpu")
    tokens = loaded.tokenizer.encode(TEXT, False, False)
    cfg = PackedCausalTransformerGeneratorArgs(max_gen_len=6)
    generator = PackedCausalTransformerGenerator(cfg, loaded.model, loaded.tokenizer)
    (done,) = generator.complete([tokens])
    export_weights.main([f"ckpt={out}", f"out={out}-hf", "format=hf"])
    llama = transformers.AutoModelForCausalLM.from_pretrained(f"{out}-hf")
    theirs = transformers.AutoTokenizer.from_pretrained(f"{out}-hf")
    inputs = theirs(TEXT, return_tensors="pt", return_token_type_ids=False)
    assert int(inputs["input_ids"].max()) < llama.config.vocab_size
    answer = llama.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert len(answer[0]) == inputs["input_ids"].shape[1] + 6
    return loaded.tokenizer, done.tokens


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_added_tokens_without_a_row_are_left_out(kind, tmp_path, capsys):
    folder, n_rows = hf_folder(tmp_path, kind, added=("<fill>", "<call>", "<|im_end|>"))
    known = {token: {"content": token} for token in ("<|im_end|>", "<call>")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<fill>",
        "eos_token": known["<|im_end|>"],
        "additional_special_tokens": ["<call>"],
        "added_tokens_decoder": {str(n_rows + 1): known["<call>"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<fill>"}))
    before = (folder / "tokenizer.json").read_bytes()
    tokenizer, _ = import_and_generate(folder, tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"({n_rows})" in printed and "<fill>" in printed and f" {n_rows} rows" in printed
    assert tokenizer.n_words == n_rows and tokenizer.eos_id == -1
    if kind == "byte-level":
        assert tokenizer.decode(tokenizer.encode(TEXT, False, False)) == TEXT
    assert (folder / "tokenizer.json").read_bytes() == before


def test_an_embedding_with_more_rows_than_tokens(tmp_path, capsys):
    folder, n_rows = hf_folder(tmp_path, extra_rows=44)
    tokenizer, tokens = import_and_generate(folder, tmp_path / "out")
    assert tokenizer.n_words == n_rows - 44 > max(tokens)
    assert "rows" not in capsys.readouterr().out


def test_another_models_tokenizer_is_refused(tmp_path):
    folder, n_rows = hf_folder(tmp_path, "byte-level", extra_rows=-5)
    with pytest.raises(UserError, match=f"tokenizer.name=hf has {n_rows + 5} .*{n_rows}"):
        import_hf.main([f"hf={folder}", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_bos_is_exported(tmp_path):
    folder, _ = hf_folder(tmp_path, "metaspace")
    (folder / "tokenizer_config.json").unlink()
    tokenizer, _ = import_and_generate(folder, tmp_path / "out")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, 1)
    config = json.loads((tmp_path / "out-hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 1)
    special = json.loads((tmp_path / "out-hf" / "tokenizer_config.json").read_text())
    assert (special["bos_token"], special["eos_token"]) == (None, "</s>")
