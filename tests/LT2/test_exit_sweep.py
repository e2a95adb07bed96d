"""The sweep of exit thresholds on a checkpoint: its table, numbers and picture."""

from __future__ import annotations

import json

import pytest
import torch

from apps.LT2.inference.early_exit import ExitDecoder
from apps.LT2.scripts import exit_sweep
from lingua.dataloader.synthetic.args import TaskArgs
from lingua.dataloader.synthetic.stream import held_out_examples
from lingua.errors import UserError
from tests.LT2.tiny import save_run, tiny_model

OPTIONS = ["device=cpu", "decode_tokens=3", "prompt_tokens=2", "repeats=1"]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (folder / "a.val.jsonl").write_text(json.dumps({"text": "held-out text " * 5}))
    model = tiny_model("full", 2, n_layers=1, max_seqlen=32, loop_loss="gate")
    generator = torch.Generator().manual_seed(1)
    model.get_parameter("exit_gate.weight").normal_(std=0.2, generator=generator)
    data = {"tokenizer": {"name": "bytes"}, "root_dir": str(tmp_path / "data")}
    data |= {"sources": {"text": 1.0}, "seq_len": 32}
    save_run(tmp_path / "run", model, 7, data=data)
    return tmp_path / "run"


def test_a_sweep_measures_fixed_loops_and_thresholds(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    exits, out = ["gate:0.001", "gate:0.5", "gate:0.999"], tmp_path / "exits.png"
    exit_sweep.main(
        [f"ckpt={run}", *OPTIONS, f"exits=[{','.join(exits)}]", "batch_sizes=[1,2]", f"out={out}"]
    )
    points = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [p["exit"] for p in points] == ["1", "2", *exits]
    one, two, early, between, late = points
    assert (early["loops"], late["loops"]) == (1, 2) and 1 < between["loops"] < 2
    assert early["loss/val"] == pytest.approx(one["loss/val"])
    assert late["loss/val"] == pytest.approx(two["loss/val"])
    assert one["flops_per_token"] < between["flops_per_token"] < late["flops_per_token"]
    assert all(p[f"tokens/s/{n}"] > 0 for p in points for n in (1, 2))
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7 and out.stat().st_size > 10_000


def test_a_task_has_an_accuracy_and_decodes_whole_examples(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    model = tiny_model("full", 2, n_layers=1, vocab_size=6, loop_loss="gate")
    data = {"task": {"name": "permutation", "group": "S3", "n": 5}, "batch_size": 8}
    save_run(tmp_path / "run", model, 7, data=data)
    decoded, out = [], tmp_path / "exits.png"
    step = ExitDecoder.step
    monkeypatch.setattr(
        ExitDecoder,
        "step",
        lambda self, x: decoded.append((self.cache.lengths[0], x[:, 0].tolist())) or step(self, x),
    )
    options = ["exits=[gate:0.5]", "batch_sizes=[2]", "decode_tokens=7", f"out={out}"]
    exit_sweep.main(
        [f"ckpt={tmp_path / 'run'}", "device=cpu", "repeats=1", "validation.max_steps=6", *options]
    )
    *_, ruled = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert 0 <= ruled["acc/val"] <= 1 and ruled["tokens/s/2"] > 0
    args = TaskArgs(name="permutation", group="S3", n=5)
    tokens = torch.from_numpy(held_out_examples(args, 0, 6)[..., 0])
    # Two batches of two examples, after one that isn't timed.
    want = [(i, tokens[b : b + 2, i].tolist()) for b in (0, 0, 2) for i in range(5)]
    assert decoded == want
    assert "acc/val" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["exits=[2]", "exits=[gate:0.5,kl:0.1]", "batch_sizes=[0]", "out=x.txt"]
)
def test_mistakes_are_user_errors(run, option):
    with pytest.raises(UserError, match=option.partition("=")[0]):
        exit_sweep.main([f"ckpt={run}", *OPTIONS, option])


def test_a_model_without_exits_is_refused(tmp_path):
    model = tiny_model("full", 2, n_layers=1, vocab_size=6)
    data = {"task": {"name": "permutation", "group": "S3", "n": 5}, "batch_size": 8}
    save_run(tmp_path / "run", model, 7, data=data)
    with pytest.raises(UserError, match="^exits="):
        exit_sweep.main([f"ckpt={tmp_path / 'run'}", *OPTIONS])
