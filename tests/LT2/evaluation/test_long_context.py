"""Recall tasks have the length that they say, one right answer in the prompt, and right scores."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from apps.LT2.eval import EvalArgs, launch_eval
from apps.LT2.evaluation.harness import EvalHarnessLM
from apps.LT2.local_tasks import long_context
from lingua.args import parse_args
from lingua.errors import UserError, run_cli
from lingua.tokenizer import ByteTokenizer
from tests.LT2.tiny import save_run, tiny_model
from tests.LT2.tiny_run import clean_process

LOCAL_TASKS = Path(__file__).parents[3] / "apps/LT2/local_tasks"
BUILD = {
    "needle": lambda request: long_context.needle_items(request, 1, "lt2_needle"),
    "multikey": lambda request: long_context.needle_items(request, request.keys, "lt2_multikey"),
    "mqar": long_context.mqar_items,
}
FACT = {
    "needle": r"magic numbers for (\w+) is: (\d+)\.",
    "multikey": r"magic numbers for (\w+) is: (\d+)\.",
    "mqar": r"^(\w+): (\d+)$",
}


class WordTokenizer(ByteTokenizer):
    """Few tokens per character, as those of a large vocabulary."""

    def encode(self, text, add_bos, add_eos):
        return [0] * add_bos + [1 for _ in re.findall(r"\w{1,4}|\W", text)] + [2] * add_eos


def request(window=4096, tokenizer=None, **options):
    found = long_context.read_request(
        {"lt2_tokenizer": ["bytes", None], "lt2_window": window, "n_items": 6, **options}
    )
    return found if tokenizer is None else found._replace(tokenizer=tokenizer)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WordTokenizer()])
@pytest.mark.parametrize("name", BUILD)
def test_prompts_have_their_length_and_one_right_answer(name, tokenizer):
    wanted = request(lengths=[1024, 2048], tokenizer=tokenizer, haystack="noise")
    items = BUILD[name](wanted)
    assert [item["length"] for item in items] == [1024] * 6 + [2048] * 6
    assert items == BUILD[name](wanted)
    for item in items:
        answer = 0 if name == "mqar" else long_context.ANSWER_TOKENS
        used = wanted.count(item["prompt"]) + answer
        room = 250 if name == "mqar" and isinstance(tokenizer, ByteTokenizer) else 100
        assert item["length"] - room < used <= item["length"]
        facts = re.findall(FACT[name], item["prompt"], re.MULTILINE)
        shown = {value for key, value in facts if key == asked_key(item["prompt"])}
        assert shown == {item["value"]}
        n_facts = len(dict(facts))
        assert n_facts == {"needle": 1, "multikey": 4}.get(name, n_facts) and n_facts >= 1
    assert len({item["value"] for item in items}) > 6


def asked_key(prompt: str) -> str:
    (key,) = re.findall(r"(?:numbers for )?(\w+)(?: mentioned in the provided text are|:)$", prompt)
    return key


def test_needles_lie_anywhere_in_the_text():
    prompts = [item["prompt"] for item in BUILD["needle"](request(lengths=[4096], n_items=40))]
    places = sorted(prompt.index("One of the") / len(prompt) for prompt in prompts)
    assert places[0] < 0.2 and places[-1] > 0.8


def test_pairs_are_asked_once_after_the_answers_before():
    items = BUILD["mqar"](request(lengths=[1024], n_items=4))
    keys = [item["prompt"].splitlines()[-1] for item in items]
    assert len(set(keys)) == 4
    for before, item in zip(items, items[1:], strict=False):
        assert item["prompt"].startswith(f"{before['prompt']} {before['value']}\n")


def test_the_default_lengths_fit_the_window():
    assert request(window=4096).lengths == [1024, 2048, 4096]
    assert request(window=10**6).lengths == [2**k for k in range(10, 16)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": [256], "name": "needle"}, r"metadata\.lengths=\[256\]: 1 needle, .* than 256"),
        ({"lengths": [512], "name": "multikey", "keys": 9}, "9 needles, .* more than 512"),
        ({"lengths": [8192]}, r"metadata\.lengths=\[8192\]: .* window of 4096 tokens"),
        ({"lengths": [1000]}, r"metadata\.lengths=\[1000\] must be a list of 256, 512"),
        ({"lengths": 1024}, r"metadata\.lengths=1024 must be a list"),
        ({"window": 512}, "window of 512 tokens is below 1024"),
        ({"haystack": "essays"}, "metadata.haystack=essays must be prose or noise"),
        ({"n_items": 0}, "metadata.n_items=0 must be"),
    ],
)
def test_impossible_tasks_are_refused(options, message):
    name = options.pop("name", "needle")
    with pytest.raises(UserError, match=message):
        BUILD[name](request(**options))


# ---- in the harness


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    save_run(root / "demo", tiny_model("full", 1, n_layers=1, max_seqlen=1024))
    return root / "demo"


def test_eval_scores_each_length(ckpt, tmp_path, monkeypatch):
    """A model that reads the answer off the prompt has accuracy 1, one that always says 0 none."""

    def search(self, requests):
        found = [
            dict(re.findall(FACT["needle"], r.args[0]))[asked_key(r.args[0])] for r in requests
        ]
        return [f" {number}." for number in found]

    options = [f"ckpt_dir={ckpt}", f"harness.include_path={LOCAL_TASKS}", "validation=null"]
    options += ["harness.tasks=[lt2_needle, lt2_multikey, lt2_mqar]", "harness.bootstrap_iters=0"]
    options += ["harness.metadata={lengths: [512, 1024], n_items: 2, keys: 2}"]
    options += ["generator.device=cpu"]
    monkeypatch.setattr(EvalHarnessLM, "generate_until", search)
    with clean_process():
        args = parse_args(EvalArgs, [*options, f"dump_dir={tmp_path}"])
        scores = launch_eval(args)["evals"]
    for task, value in {"lt2_needle": 1.0, "lt2_multikey": 1.0, "lt2_mqar": 0.0}.items():
        found = {k: v for k, v in scores[task].items() if k.startswith("acc") and "stderr" not in k}
        assert found == {f"{name},none": value for name in ("acc", "acc_512", "acc_1024")}


def test_the_command_line_of_the_harness_counts_in_the_models_tokens(ckpt, monkeypatch, capsys):
    import lm_eval.tasks

    from apps.LT2.lm_eval import main

    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)  # faster
    command = ["run", "--model", "lt2", "--model_args", f"ckpt={ckpt},device=cpu"]
    command += ["--include_path", str(LOCAL_TASKS), "--tasks", "lt2_mqar"]
    for lengths, status in (("[256]", 0), ("[2048]", 2)):
        metadata = f'{{"lengths": {lengths}, "n_items": 1}}'
        monkeypatch.setattr(sys, "argv", ["lm_eval", *command, "--metadata", metadata])
        with clean_process():
            if status == 0:
                main(command)
                assert "acc_256" in capsys.readouterr().out
                continue
            with pytest.raises(SystemExit) as stopped:
                run_cli(main)
        assert stopped.value.code == status
        lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
        assert len(lines) == 1 and "window of 1024 tokens" in lines[0]
