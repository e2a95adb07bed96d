"""Scores of tokens that leave the loops early."""

from __future__ import annotations

import json

import pytest
import torch

from apps.LT2.eval import launch_eval
from apps.LT2.evaluation import evaluate as evaluation
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.evaluation.scoring import score_continuations
from apps.LT2.exits import exit_states, parse_exit
from lingua.args import parse_args
from lingua.errors import UserError
from tests.LT2.tiny import save_run, tiny_model
from tests.LT2.tiny_run import clean_process

TEXT = "one text that fills a row, and a part of the next one"
SEQ_LEN = 32


def gated():
    model = tiny_model("full", 3, n_layers=1, max_seqlen=SEQ_LEN, loop_loss="gate")
    model.exit_gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (folder / "a.val.jsonl").write_text(json.dumps({"text": TEXT}))
    data = {"tokenizer": {"name": "bytes"}, "root_dir": str(tmp_path / "data"), "add_eos": False}
    data |= {"sources": {"text": 1.0}, "seq_len": SEQ_LEN}
    save_run(tmp_path / "run", gated(), 7, data=data)
    return tmp_path / "run"


def evaluate(run, *options: str) -> dict:
    args = parse_args(EvalArgs, [f"ckpt_dir={run}", "generator.device=cpu", *options])
    with clean_process():
        launch_eval(args)
    return json.loads((run / "metrics.validation.jsonl").read_text().splitlines()[-1])


def by_hand(exit: str) -> tuple[float, float]:
    """Return nats per token and loops per token of the two rows."""
    model, tokens = gated(), torch.tensor([256, *TEXT.encode()])
    nats, loops = [], []
    for start in range(0, len(tokens) - 1, SEQ_LEN):
        row = tokens[start : start + SEQ_LEN + 1]
        h, n = exit_states(model, row[None, :-1], parse_exit(exit))
        logp = model.logits_of(h[0]).log_softmax(-1)
        nats += (-logp[range(len(row) - 1), row[1:]]).tolist()
        loops += n[0].tolist()
    return sum(nats) / len(nats), sum(loops) / len(loops)


@pytest.mark.parametrize("exit", ["gate:0.6", "kl:0.1"])
def test_validation_scores_each_token_where_it_leaves(run, exit):
    record = evaluate(run, f"exit={exit}")
    nats, loops = by_hand(exit)
    assert record["loss/val"] == pytest.approx(nats, rel=1e-5)
    assert record["loops"] == pytest.approx(loops) and 1 < loops < 3
    shares = [record[f"loops/exit/{t}"] for t in range(3)]
    assert sum(shares) == pytest.approx(1)
    assert record["differs_from_run"] == {"exit": exit}
    model = gated()
    per_loop = model.layers[0].mixer(model.layout[0][0]).flops_per_token(SEQ_LEN) + 6 * (
        model.args.dim * model.layers[0].feed_forward.hidden_dim
    )
    head, gates = 2 * model.args.dim * model.args.vocab_size, shares[0] + 2 * (1 - shares[0])
    decisions = head * (loops - 1) if exit.startswith("kl") else 2 * model.args.dim * gates
    assert record["flops_per_token"] == pytest.approx(loops * per_loop + head + decisions, abs=1)


def test_a_fixed_exit_scores_as_fewer_loops(run):
    want, got = evaluate(run, "loop_count=2"), evaluate(run, "exit=2")
    assert got["differs_from_run"] == {"exit": "2"}
    names = ("loss/val", "loops", "flops_per_token")
    assert [got[name] for name in names] == [want[name] for name in names]


def test_continuations_are_scored_where_tokens_leave():
    model, rule = gated(), parse_exit("gate:0.6")
    requests = [([256, *b"a context"], list(b" and more")), ([256], list(b"words"))]
    scores = score_continuations(model, requests, max_len=40, max_tokens=80, rule=rule)
    for (context, continuation), (got, _) in zip(requests, scores, strict=True):
        h, _ = exit_states(model, torch.tensor([[*context, *continuation[:-1]]]), rule)
        logp = model.logits_of(h[0]).log_softmax(-1)[len(context) - 1 :]
        assert got == pytest.approx(logp[range(len(continuation)), continuation].sum().item())


@pytest.mark.parametrize("options", [["exit=9"], ["exit=3", "loop_counts=[2,3]"], ["exit=kl:2"]])
def test_wrong_exits_are_refused_before_the_model_loads(run, options, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda args: pytest.fail("loads"))
    with pytest.raises(UserError, match="exit="):
        evaluate(run, *options)
