"""The lens: predictions after each loop against the model's own outputs, tables and pictures."""

from __future__ import annotations

import json

import pytest
import torch

from apps.LT2.scripts.loop_lens import look, main, token_text
from lingua.errors import UserError
from lingua.tokenizer import ByteTokenizer
from tests.LT2.tiny import CACHE_KINDS, save_run, tiny_model

TEXT = "a loop"
TOKENIZER = ByteTokenizer()


def ids() -> torch.Tensor:
    return torch.tensor([TOKENIZER.encode(TEXT, add_bos=True, add_eos=False)])


@pytest.mark.parametrize("kind", ["full", *CACHE_KINDS])
def test_each_loop_predicts_what_a_model_of_so_many_loops_does(kind):
    model = tiny_model(kind, 3).eval()
    lens = look(model, TOKENIZER, TEXT, add_bos=True, positions="all", top_k=3)
    assert lens.tokens == ["<bos>", *"a␣loop"]
    logp = []
    for T in (1, 2, 3):
        model.set_loops(T)
        logp.append(model(ids())[0].log_softmax(-1))
    for row, own in zip(lens.loops, logp, strict=True):
        for seen, at, last in zip(row, own, logp[-1], strict=True):
            values, tokens = at.exp().topk(3)
            texts = [token_text(TOKENIZER, None, token) for token in tokens.tolist()]
            assert [text for text, _ in seen.top] == texts
            assert [p for _, p in seen.top] == pytest.approx(values.tolist(), rel=1e-4)
            kl = (last.exp() * (last - at)).sum().item()
            assert seen.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    (of_last,) = look(model, TOKENIZER, TEXT, add_bos=True, top_k=3).loops[-1]
    assert of_last.top == [pytest.approx(pair) for pair in lens.loops[-1][-1].top]


def test_updates_are_relative_to_the_state_before():
    model = tiny_model("full", 2).eval()
    states = model.loop_states(ids())
    torch.testing.assert_close(model.logits_of(states[-1]), model(ids()))
    lens = look(model, TOKENIZER, TEXT, add_bos=True)
    for t, row in enumerate(lens.loops):
        before, after = states[t, 0, -1], states[t + 1, 0, -1]
        assert row[0].update == pytest.approx((after - before).norm().item() / before.norm().item())


def test_texts_of_tokens():
    assert [token_text(TOKENIZER, None, t) for t in (TOKENIZER.bos_id, TOKENIZER.eos_id)] == [
        *("<bos>", "<eos>"),
    ]
    first, second = TOKENIZER.encode("ä", add_bos=False, add_eos=False)
    assert token_text(TOKENIZER, None, first) == f"<{first}>"
    (newline,) = TOKENIZER.encode("\n", add_bos=False, add_eos=False)
    assert token_text(TOKENIZER, second, newline) == r"\n"
    assert token_text(TOKENIZER, None, 10_000) == "<10000>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for T in (1, 2, 12):
        save_run(root / str(T), tiny_model("full", T, n_layers=1, max_seqlen=64))
    return root


@pytest.mark.parametrize("T, positions", [(1, "last"), (1, "all"), (12, "all"), (12, "last")])
def test_tables_fit_a_terminal(runs, capsys, T, positions):
    prompts = json.dumps([TEXT, "two\tlines\n and a prompt of more than thirty tokens"])
    options = [f"prompts={prompts}", f"positions={positions}", "device=cpu", "top_k=9"]
    main([str(runs / str(T)), *options])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("prompt: " in line for line in lines) == 2
    if positions == "last":
        assert [line[:4].strip() for line in lines[2 : 2 + T]] == [str(t + 1) for t in range(T)]
        assert lines[1 + T].split()[1] == "0.0000"  # KL of the last loop to itself
    else:
        heads = [word for word in lines[1].split() if word.isdigit()]
        assert heads[0] == "1" and heads[-1] == str(T)


@pytest.mark.parametrize("T, positions", [(1, "last"), (2, "all")])
def test_pictures(runs, tmp_path, T, positions):
    pytest.importorskip("matplotlib")
    options = ["prompts=[a, bc]", f"positions={positions}", "device=cpu", "top_k=2"]
    main([str(runs / str(T)), *options, f"out={tmp_path}/lens.png"])
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")


def test_json_has_every_loop(runs, capsys):
    options = [f"prompt={TEXT}", "positions=all", "device=cpu", "loop_count=2", "format=json"]
    main([str(runs / "1"), *options])
    (found,) = json.loads(capsys.readouterr().out)
    assert len(found["loops"]) == 2 and len(found["loops"][0]) == len(TEXT) + 1
    assert found["prompt"] == TEXT and found["loops"][1][0]["kl"] == 0


@pytest.mark.parametrize(
    "options, named",
    [
        ([], "prompt"),
        (["prompt=a", "prompts=[b]"], "prompt"),
        (["prompts=[]"], "prompt"),
        (["prompt=a", "positions=first"], "positions=first"),
        (["prompt=a", "top_k=0"], "top_k=0"),
        (["prompt=a", "loop_count=0"], "loop_count=0"),
        (["prompt=a", "out=x.txt"], "out=x.txt"),
        (["prompt=a", "out=file/x.png"], "out=file"),
    ],
)
def test_mistakes(runs, tmp_path, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=named):
        main([str(runs / "1"), "device=cpu", *options])
