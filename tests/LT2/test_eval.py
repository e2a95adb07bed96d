"""Evaluation with the real harness: scores, files, and mistakes."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from apps.LT2.eval import EvalArgs, launch_eval, launch_parts, main, resolve, validate_before_submit
from apps.LT2.local_tasks.items import choice_items, cloze_items, copy_items, read_documents
from lingua.args import parse_args
from lingua.errors import UserError, run_cli
from lingua.tokenizer import ByteTokenizer
from tests.lingua.stool_utils import held
from tests.LT2.tiny import save_run, tiny_model
from tests.LT2.tiny_run import clean_process
from tests.readme import commands

pytest.importorskip("lm_eval")

from lm_eval.utils import make_table  # noqa: E402

from apps.LT2.evaluation.evaluate import add_chance  # noqa: E402

ROOT = Path(__file__).parents[2]
TEXT = """the loop turns again and every layer sees its past while weights stay as they were
before some heads look far behind others keep only what is near and small"""
WORDS = TEXT.split()
N_PASSAGES, SEQ_LEN = 12, 256
pytestmark = pytest.mark.slow


def write_documents(folder: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(N_PASSAGES // 2):
        picks = torch.randint(len(WORDS), (2, 20), generator=generator).tolist()
        texts.append("\n\n".join(" ".join(WORDS[i] for i in row) + "." for row in picks))
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "text.val.jsonl").write_text("".join(lines))
    (folder / "text.chunk.00.jsonl").write_text("".join(lines))
    return texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder with data/local and runs/demo, whose model has memorized the text."""
    root = tmp_path_factory.mktemp("place")
    texts = write_documents(root / "data" / "local")
    paragraphs = [p for text in texts for p in text.split("\n\n")]
    rows = [ByteTokenizer().encode(p, add_bos=True, add_eos=True) for p in paragraphs]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    model = tiny_model("full", 2, dim=64, n_layers=1, max_seqlen=SEQ_LEN).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(padded[:, :-1].clamp(min=0), target=padded[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    data = {
        "tokenizer": {"name": "bytes"},
        "root_dir": "data",
        "sources": {"local": 1.0},
        "seq_len": SEQ_LEN,
        "batch_size": 2,
    }
    save_run(root / "runs" / "demo", model.requires_grad_(False), step=7, data=data)
    return root


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


LOCAL = [
    "ckpt_dir=runs/demo",
    f"harness.include_path={ROOT / 'apps/LT2/local_tasks'}",
    "harness.bootstrap_iters=0",
    "generator.max_gen_len=16",
    "generator.max_tokens=600",
    "generator.device=cpu",
]
ALL_TASKS = [*LOCAL, "harness.tasks=[lt2_local]"]


def run(*options: str, **kwargs):
    with clean_process():
        return launch_eval(parse_args(EvalArgs, list(options), **kwargs))


@pytest.fixture(scope="module")
def scores(place):
    before = os.getcwd()
    os.chdir(place)
    try:
        return run(*ALL_TASKS)
    finally:
        os.chdir(before)


def test_a_model_that_memorized_the_text_scores_above_chance(scores):
    tasks = scores["evals"]
    n = N_PASSAGES
    assert tasks["lt2_local_choice"]["sample_len"] == n
    chance = 0.25  # the margin below is eight standard deviations of guessing
    assert tasks["lt2_local_choice"]["acc,none"] > chance + 0.4
    assert tasks["lt2_local_cloze"]["acc,none"] > 0.5
    assert tasks["lt2_local_cloze"]["perplexity,none"] < len(WORDS) / 4


def test_one_evaluation_at_a_time_writes_to_a_folder(here):
    """The folder of a training run may be locked by that run."""
    for folder, message in (("evals/a", "dump_dir"), ("runs/demo", "no_data")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with held(Path(folder)), pytest.raises(UserError, match=message):
            options = ["harness=null", "validation.root_dir=no_data", "generator.device=cpu"]
            run("ckpt_dir=runs/demo", *options, f"dump_dir={folder}")


def test_files_of_an_evaluation(place, scores):
    folder = place / "runs" / "demo" / "evals" / "0000000007"
    results = json.loads((folder / "results.json").read_text())
    assert results["results"] == scores["evals"]
    assert results["config"]["model_args"] == {"path": "runs/demo/checkpoints/0000000007"}
    (dated,) = folder.glob("results_*.json")
    assert json.loads(dated.read_text()) == results
    (answers,) = folder.glob("samples_lt2_local_copy_*.jsonl")
    assert len(answers.read_text().splitlines()) == N_PASSAGES
    (line,) = (place / "runs" / "demo" / "metrics.eval.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.pop("global_step") == 7 and record.pop("created_at")
    made_with, differs = record.pop("made_with"), record.pop("differs_from_run")
    assert (results["made_with"], results["differs_from_run"]) == (made_with, differs)
    assert made_with["loop_count"] == 2 and made_with["dtype"] == "fp32" and differs == {}
    assert made_with["harness.limit"] is None and made_with["checkpoint"].endswith("/0000000007")
    assert made_with["num_fewshot"]["lt2_local_choice"] == 0
    assert set(made_with["code_version"]) == {"commit", "dirty"} and made_with["lm_eval"]
    assert record.pop("chance") == results["chance"]
    assert record.pop("loops") == 2 and record.pop("flops_per_token") > 0
    assert record == scores["evals"]


def test_scores_are_shown_beside_their_chance_level(place, scores):
    folder = place / "runs" / "demo" / "evals" / "0000000007"
    results = json.loads((folder / "results.json").read_text())
    assert results["chance"]["lt2_local_choice"] == {"acc": 0.25, "acc_norm": 0.25}
    assert results["chance"]["lt2_local_copy"] == {"acc": 0}
    lines = add_chance(make_table(results), results).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    shown = {(row[5], row[-2]) for row in cells}
    assert {("Metric", "Chance"), ("acc_norm", "0.2500"), ("bits_per_byte", "8.0000")} <= shown
    assert ("word_perplexity", "") in shown
    assert len({len(row) for row in cells if len(row) > 1}) == 1


def test_several_numbers_of_loops_share_the_tasks(here, scores):
    """The scores of the second number equal an evaluation with this number alone."""
    before = Path("runs/demo/metrics.eval.jsonl").read_text()
    with clean_process():
        tasks = ["harness.tasks=[lt2_local_cloze]", "validation=null", "loop_counts=[1, 2]"]
        one, two = launch_parts(parse_args(EvalArgs, [*LOCAL, *tasks]))
    found = [part["evals"]["lt2_local_cloze"]["perplexity,none"] for part in (one, two)]
    alone = scores["evals"]["lt2_local_cloze"]["perplexity,none"]
    assert found[1] == pytest.approx(alone, rel=1e-6) and found[0] > 1.01 * alone
    Path("runs/demo/metrics.eval.jsonl").write_text(before)


def test_a_limit_does_not_replace_the_whole_result(here, scores):
    whole = Path("runs/demo/evals/0000000007/results.json").read_bytes()
    run(*ALL_TASKS, "harness.tasks=[lt2_local_choice]", "harness.limit=2.0", "loop_count=1")
    assert Path("runs/demo/evals/0000000007/results.json").read_bytes() == whole
    (folder,) = Path("runs/demo/evals").glob("*limit*")
    assert folder.name == "0000000007-loop_count=1,limit=2"
    record = json.loads(Path("runs/demo/metrics.eval.jsonl").read_text().splitlines()[-1])
    assert record["differs_from_run"] == {"loop_count": 1, "harness.limit": 2}


def test_validation_loss_is_positive_and_in_nats(place, scores):
    folder = place / "runs" / "demo"
    found = json.loads((folder / "evals" / "0000000007" / "validation.json").read_text())
    assert scores["validation"].items() <= found.items()
    line = (folder / "metrics.validation.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["loss/val"] == found["loss/val"] > 0
    made_with = json.loads(line)["made_with"]
    assert made_with == found["made_with"] and made_with["loop_count"] == 2
    assert made_with["validation.max_steps"] is None and "harness.limit" not in made_with
    assert found["ppl/val"] == pytest.approx(math.exp(found["loss/val"]))
    texts = read_documents(str(place / "data" / "local"))
    n_bytes = sum(len(text) for text in texts)
    n_targets = n_bytes + 2 * len(texts) - 1  # with BOS and EOS; nothing predicts the first token
    nats = found["loss/val"] * n_targets
    assert found["loss/val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes)


def test_two_processes_give_the_results_of_one_process(here, scores, quick_python, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "apps.LT2.eval", *ALL_TASKS, "dump_dir=two"]
    done = quick_python.run(*command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(Path("two/results.json").read_text())
    assert results["results"] == scores["evals"]
    validation = json.loads(Path("two/validation.json").read_text())
    made_with = validation.pop("made_with")
    assert made_with["loop_count"] == 2 and validation.pop("differs_from_run") == {}
    assert validation.pop("loops") == 2 and validation.pop("flops_per_token") > 0
    assert validation == pytest.approx(scores["validation"], rel=1e-6)
    assert len(Path("two/metrics.eval.jsonl").read_text().splitlines()) == 1


def test_only_validation_or_only_the_harness(here):
    assert set(run("ckpt_dir=runs/demo", "harness=null", "dump_dir=half")) == {"validation"}
    assert not Path("half/results.json").exists()
    tasks = ["harness.tasks=[lt2_local_choice]", "harness.limit=3", "validation=null"]
    scores = run(*LOCAL, *tasks, "dump_dir=half")
    assert set(scores) == {"evals"}
    assert scores["evals"]["lt2_local_choice"]["sample_len"] == 3


def test_a_file_of_weights_needs_a_dump_dir(here):
    torch.save({"model": {}}, "consolidated.pth")
    shutil.copy("runs/demo/checkpoints/0000000007/params.json", "params.json")
    with pytest.raises(UserError, match="dump_dir is not set.*consolidated.pth"):
        resolve(EvalArgs(ckpt_dir="consolidated.pth"))
    assert resolve(EvalArgs(ckpt_dir="consolidated.pth", dump_dir="x")).metric_log_dir == "x"
    assert resolve(EvalArgs(ckpt_dir="runs/demo", global_step=3)).global_step == 3


def test_another_loop_count(here, scores):
    once = run("ckpt_dir=runs/demo", "loop_count=1", "dump_dir=once")
    assert once["validation"]["loss/val"] != scores["validation"]["loss/val"]


# ---- mistakes


def damaged(place: Path, name: str, damage) -> str:
    folder = place / "damaged" / name
    if not folder.exists():
        shutil.copytree(place / "runs" / "demo", folder)
        damage(folder / "checkpoints" / "0000000007")
    return f"ckpt_dir={folder}/checkpoints/0000000007"


def cut_weights(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])


def shrink_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "params.json").read_text())
    config["model"]["vocab_size"] = 100
    (folder / "params.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()


CHOICE = [*LOCAL, "harness.tasks=[lt2_local_choice]", "validation=null"]
MISTAKES = {
    "ckpt_dir is empty": [],
    "ckpt_dir=nowhere: no such file": ["ckpt_dir=nowhere"],
    "harness=null validation=null": ["ckpt_dir=runs/demo", "validation=null"],
    "error: validation.max_steps=0 must": ["validation.max_steps=0"],
    "error: generator.max_gen_len=-1 must": [*LOCAL, "generator.max_gen_len=-1"],
    "harness.tasks is empty": ["ckpt_dir=runs/demo", "harness.limit=3"],
    "harness.include_path=nowhere: no": [
        *LOCAL,
        "harness.tasks=[a]",
        "harness.include_path=nowhere",
    ],
    "unknown option harness.taks": ["harness.taks=[a]"],
    "lt2_local_choice cannot be loaded: FileNotFoundError: no .*val.jsonl in /nowhere": [
        *LOCAL,
        "harness.tasks=[lt2_local_choice]",
        "harness.metadata={folder: /nowhere}",
    ],
    "harness.num_fewshot=-1 must be 0 or more": [*CHOICE, "harness.num_fewshot=-1"],
    "harness.num_fewshot=13: lt2_local_choice has 12 examples": [
        *CHOICE,
        "harness.num_fewshot=13",
    ],
    "harness.samples.lt2_local_choice: no question 12; .* 0 to 11": [
        *CHOICE,
        "harness.samples={lt2_local_choice: [0, 12]}",
    ],
    "harness.samples.other: no task of that name": [*CHOICE, "harness.samples={other: [0]}"],
    "harness.fewshot_as_multiturn=true needs": [*CHOICE, "harness.fewshot_as_multiturn=true"],
    "harness.use_cache=/proc/none: cannot write": [*CHOICE, "harness.use_cache=/proc/none/x"],
    "stride=1000 must be 1 to the 256 tokens": [*CHOICE, "harness.stride=1000"],
    "harness.tasks: lt2_local_copy: temperature=-1.0 must be": [
        *LOCAL,
        "harness.tasks=[lt2_local_copy]",
        "harness.limit=1",
        "validation=null",
        "harness.gen_kwargs={temperature: -1}",
    ],
    "validation: no .*val.jsonl with text in data.root_dir=data": [
        "ckpt_dir=runs/demo",
        "validation.use_val_from_train_src=false",
    ],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_prints_one_line_and_exits_with_2(here, monkeypatch, capsys, message):
    monkeypatch.setattr(sys, "argv", ["eval", *MISTAKES[message]])
    with pytest.raises(SystemExit) as stopped, clean_process():
        run_cli(main)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0])


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (
            "no_config",
            lambda f: (f / "params.json").unlink(),
            "ckpt_dir=.*params.json",
        ),
        ("half_written", cut_weights, "ckpt_dir=.*damaged: .*distcp"),
        ("vocabulary", shrink_vocabulary, "ckpt_dir=.*model.vocab_size=100"),
    ],
)
def test_a_damaged_checkpoint_is_a_user_error(here, name, damage, message):
    with pytest.raises(UserError, match=message):
        run(damaged(here, name, damage))


def test_an_unknown_task_suggests_a_similar_name(here, monkeypatch):
    import lm_eval.tasks

    known = lm_eval.tasks.TaskManager
    local = str(ROOT / "apps/LT2/local_tasks")
    monkeypatch.setattr(  # reading all files of the harness is slow
        lm_eval.tasks, "TaskManager", lambda **_: known(include_path=local, include_defaults=False)
    )
    args = parse_args(EvalArgs, [*LOCAL, "harness.tasks=[lt2_local_choise]"])
    with pytest.raises(UserError, match="no task, group or tag lt2_local_choise; did you mean lt2"):
        validate_before_submit(args, 1)


# ---- the harness's own command line


def test_the_registered_model_with_the_harness_command_line(here, monkeypatch, scores):
    import lm_eval.tasks

    from apps.LT2.lm_eval import main

    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)  # faster
    start = "python -m apps.LT2.lm_eval "
    (said,) = (c.text for c in commands() if c.text.startswith(start))  # in docs/evaluation.md
    said = said.removeprefix(start).replace("apps/LT2", str(ROOT / "apps/LT2"))
    said = said.replace("ckpt=runs/quickstart", "ckpt=runs/demo,max_tokens=600,device=cpu")
    command = [*shlex.split(said), "--output_path", "own/results.json"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    with clean_process():
        main(command)
    (file,) = Path("own").glob("results_*.json")
    results = json.loads(file.read_text())["results"]
    for task in ("lt2_local_choice", "lt2_local_copy"):
        assert results[task]["acc,none"] == scores["evals"][task]["acc,none"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "lt2_local_choise"], "Tasks not found: lt2_local_choise; .* ls tasks"),
        (["--tasks", ""], "No tasks specified"),
        (["--tasks", "lt2_local_choice", "--model", "lt3"], "Attempted to load model 'lt3'"),
        (["--tasks", "lt2_local_choice", "--limit", "-5"], "islice.*--limit"),
        (["--tasks", "lt2_local_choice", "--model_args", "ckpt=nowhere"], "ckpt=nowhere: no such"),
    ],
)
def test_mistakes_on_the_harness_command_line(here, monkeypatch, capsys, options, message):
    import lm_eval.tasks

    from apps.LT2.lm_eval import main

    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    command = ["run", "--model", "lt2", "--model_args", "ckpt=runs/demo,device=cpu"]
    command += ["--include_path", str(ROOT / "apps/LT2/local_tasks"), *options]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    with pytest.raises(SystemExit) as stopped, clean_process():
        run_cli(main)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0])


# ---- local tasks


def test_items_read_documents_like_validation(tmp_path):
    """Unicode line separators don't end a line, and the key may be `content`."""
    lines = [{"text": "one\u2028two\x85three"}, {"content": "four"}]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "a.val.jsonl").write_text(text, encoding="utf-8")
    assert read_documents(str(tmp_path)) == ["one\u2028two\x85three", "four"]


def test_items_match_the_documents(place):
    texts = read_documents(str(place / "data" / "local"))
    whole = "\n\n".join(texts)
    for item in choice_items(texts):
        assert len(set(item["choices"])) == 4
        right = f"{item['start']} {item['choices'][item['gold']]}"
        assert right in whole
    assert len({item["gold"] for item in choice_items(texts)}) == 4
    for item in cloze_items(texts):
        assert f"{item['context']} {item['word']}" in whole
    for item in copy_items(texts):
        passage, _, start = item["prompt"].partition("\n\n")
        assert passage.startswith(f"{start} {item['next']}")
    assert choice_items(texts) == choice_items(texts)
