"""The harness gives an exported folder the scores that it gives our model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apps.LT2.evaluation.harness import EvalHarnessLM
from apps.LT2.inference.generator import PackedCausalTransformerGeneratorArgs
from apps.LT2.inference.load import load_model_and_tokenizer
from apps.LT2.scripts import export_weights
from tests.LT2.tiny import save_run, tiny_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

PAIRS = [
    ("The loop turns", " again"),
    ("The loop turns ", "again <bos>"),
    ("Ein Satz: é ", "<eos> und mehr"),
    ("", "no context"),
]
TEXTS = ["A document. " * 12, "x", "日本語 <s>"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save_run(folder / "run", tiny_model("hybrid", 2, max_seqlen=64))
    export_weights.main([f"ckpt={folder / 'run'}", "format=hf", f"out={folder / 'hf'}"])
    loaded = load_model_and_tokenizer(str(folder / "run"), dtype="fp32", device="cpu")
    cfg = PackedCausalTransformerGeneratorArgs(temperature=0.0, max_gen_len=8, max_tokens=512)

    from lm_eval.models.huggingface import HFLM  # takes over a second in every collection

    theirs = HFLM(str(folder / "hf"), trust_remote_code=True, device="cpu", dtype="float32")
    return EvalHarnessLM(loaded, cfg), theirs


def requests(arguments):
    return [
        SimpleNamespace(args=given, task_name="test", doc_id=i) for i, given in enumerate(arguments)
    ]


def test_scores_and_answers(models):
    ours, theirs = models
    want = ours.loglikelihood(requests(PAIRS))
    got = theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert [p for p, _ in got] == pytest.approx([p for p, _ in want], abs=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = requests([(text, settings) for text in TEXTS])
    assert theirs.generate_until(prompts, disable_tqdm=True) == ours.generate_until(prompts)


def test_rolling_scores(models, monkeypatch):
    ours, theirs = models
    monkeypatch.setattr(theirs, "add_bos_token", False)  # else it scores BOS after BOS
    texts = requests([(text,) for text in TEXTS])
    want = ours.loglikelihood_rolling(texts)
    got = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert got == pytest.approx(want, rel=1e-5)
