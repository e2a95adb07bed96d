"""The model card has what the run recorded, and its program runs."""

from __future__ import annotations

import json

import pytest
import yaml

from apps.LT2.huggingface.model_card import write_model_card
from apps.LT2.inference.load import load_model_and_tokenizer
from lingua.checkpoint import find_checkpoint
from tests.LT2.tiny import save_run, tiny_model


def write_records(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "first_run"
    save_run(run, tiny_model("hybrid", 2))
    step = int(find_checkpoint(run).name)
    metrics = [
        {"global_step": step - 1, "loss/out": 3.5, "optim/total_tokens": 1000},
        {"global_step": step, "loss/out": 3.25, "optim/total_tokens": 2000},
        {"global_step": step, "loss/val": 3.75, "loss/val_bpb": 1.5},
        {"global_step": step + 1, "loss/out": 1.0, "optim/total_tokens": 3000},
    ]
    write_records(run / "metrics.jsonl", metrics)
    score = {"hellaswag": {"acc,none": 0.625}, "made_with": {}, "differs_from_run": {}}
    write_records(run / "metrics.eval.jsonl", [{"global_step": step, **score}])
    return run


def make_card(run, folder, model_type="lt2", **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_model_and_tokenizer(str(run), dtype="fp32", device="cpu")
    loaded.config.update(config)
    write_model_card(folder, loaded, find_checkpoint(run))
    return (folder / "README.md").read_text()


def rows(card):
    cells = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| "))
    return {line[0]: line[1:] for line in cells}


def test_the_card_of_a_run(run, tmp_path):
    card = make_card(run, tmp_path / "out")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lt2", "looped-transformer", "full", "gdn"],
    }
    assert "# first_run\n" in body and "trust_remote_code=True" in body
    found = rows(card)
    assert found["layers"] == ["3"] and found["loops"] == ["2"] and found["dim"] == ["32"]
    assert found["training tokens"] == ["2,000"]
    assert found["training loss"] == ["3.2500"] and found["validation loss"] == ["3.7500"]
    assert found["bits per byte"] == ["1.5000"]
    assert found["hellaswag"][:2] == ["acc", "0.6250"]
    assert "loops 0-1" in body and "@misc{deng2026" in body
    assert str(tmp_path) not in card


def test_a_file_of_weights_has_no_losses(run, tmp_path):
    folder = tmp_path / "exported"
    data = {"sources": {"web": 3.0, "code": 1.0}, "root_dir": "/home/me/data"}
    config = json.loads((find_checkpoint(run) / "params.json").read_text())
    folder.mkdir()
    config["data"] |= data
    config["name"] = "study"
    import torch

    torch.save(dict(tiny_model("hybrid", 2).state_dict()), folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps(config))
    card = make_card(folder / "consolidated.pth", tmp_path / "out")
    assert "# study\n" in card and "/home/me" not in card
    assert rows(card)["data"] == ["web (75%), code (25%)"]
    assert "training loss" not in rows(card) and "## Scores" not in card


def test_a_llama_needs_no_code_and_a_chat_template_is_shown(run, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text("x")
    card = make_card(run, folder, "llama")
    assert "trust_remote_code" not in card and "apply_chat_template" in card
    program = card.partition("```python\n")[2].partition("```")[0]
    compile(program, "card", "exec")
