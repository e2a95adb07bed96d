"""Records name what changes a score, and no result replaces one with other options."""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apps.LT2.eval import launch_eval
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.evaluation.evaluate import flatten_scores
from apps.LT2.evaluation.records import Conditions, choose_folder, find_conditions, make_way
from lingua.args import parse_args
from lingua.errors import UserError
from lingua.evaluations import UNKNOWN, read_evaluations
from lingua.run_table import build_table, format_as
from lingua.runs import read_runs
from tests.LT2.tiny import save_run, tiny_model
from tests.LT2.tiny_run import WORDS, clean_process

CONFIG: dict[str, Any] = {
    "model": {"loop_count": 2},
    "data": {"tokenizer": {"name": "bytes", "path": None}},
}
WITH_HARNESS = {**CONFIG, "eval": {"harness": {"tasks": ["a", "b"], "limit": 4}}}
STEP = "0000000007"


def conditions(*options: str, config=CONFIG) -> Conditions:
    args = parse_args(EvalArgs, ["generator.device=cpu", *options])
    return find_conditions(args, Path("run/checkpoints", STEP), config)


TASKS = "harness.tasks=[a, b]"
OWN = [
    (CONFIG, []),
    (CONFIG, ["loop_count=2"]),
    (CONFIG, ["loop_count=2.0", "harness=null"]),
    (CONFIG, ["generator.dtype=fp32"]),
    (CONFIG, ["generator.max_tokens=9999", "generator.compile_prefilling=true"]),
    (CONFIG, ["generator.temperature=0.5"]),  # nothing is generated
    (CONFIG, ["validation.max_steps=null"]),
    (CONFIG, [TASKS, "harness.limit=null"]),
    (CONFIG, ["harness.tasks=[c]", "harness.include_path=d", "generator.max_gen_len=9"]),
    (CONFIG, [TASKS, "harness.log_samples=false", "harness.verbosity=ERROR"]),
    (WITH_HARNESS, ["validation=null"]),
    (WITH_HARNESS, [TASKS, "harness.limit=4"]),
    (WITH_HARNESS, ["harness.tasks=[b, {task: a}]", "harness.limit=4.0", "validation=null"]),
]


@pytest.mark.parametrize("config, options", OWN)
def test_the_own_options_of_a_run_given_in_any_form(config, options):
    if options == ["validation=null"]:
        options = [*options, TASKS, "harness.limit=4"]
    found = conditions(*options, config=config)
    assert found.differing == {}
    assert choose_folder(Path("evals", STEP), found)[0] == Path("evals", STEP)


OTHERS = [
    (CONFIG, "loop_count=4", ["loop_count=4"]),
    (CONFIG, "loop_count=1", ["loop_count=1", "harness=null"]),
    (CONFIG, "dtype=bf16", ["generator.dtype=bf16"]),
    (CONFIG, "limit=8", [TASKS, "harness.limit=8.0"]),
    (CONFIG, "limit=0.5", [TASKS, "harness.limit=0.5"]),
    (CONFIG, "num_fewshot=0", [TASKS, "harness.num_fewshot=0"]),
    (CONFIG, "temperature=0.5", [TASKS, "generator.temperature=0.5"]),
    (CONFIG, "apply_chat_template=true", [TASKS, "harness.apply_chat_template=true"]),
    (CONFIG, "max_steps=3", ["validation.max_steps=3"]),
    (CONFIG, "use_val_from_train_src=false", ["validation.use_val_from_train_src=false"]),
    (CONFIG, "loop_count=4,limit=8", [TASKS, "loop_count=4", "harness.limit=8"]),
    (
        CONFIG,
        "tasks=_task_a,_num_fewshot_5_-[0-9a-f]{8}",
        ["harness.tasks=[{task: a, num_fewshot: 5}]"],
    ),
    (WITH_HARNESS, "limit=null", [TASKS]),
    (WITH_HARNESS, "tasks=_a_-[0-9a-f]{8}", ["harness.tasks=[a]", "harness.limit=4"]),
    (WITH_HARNESS, "max_gen_len=9", [TASKS, "harness.limit=4", "generator.max_gen_len=9"]),
]


@pytest.mark.parametrize("config, label, options", OTHERS)
def test_other_options_name_the_folder(config, label, options):
    folder, found = choose_folder(Path("evals", STEP), conditions(*options, config=config))
    assert folder.parent == Path("evals")
    assert re.fullmatch(f"{STEP}-{label}", folder.name)
    assert len(found.differing) == label.count("=")


def test_any_value_is_a_folder_beside_the_own_results():
    texts = ["../../x", "a b", "/", "\n", "ä" * 300, "ä" * 301, "null", "null "]
    names = set()
    for text in texts:
        args = parse_args(EvalArgs, [TASKS, f"harness.system_instruction={json.dumps(text)}"])
        found = find_conditions(args, Path("c"), CONFIG)
        folder, _ = choose_folder(Path("evals", STEP), found)
        assert folder.parent == Path("evals") and len(os.fsencode(folder.name)) < 256
        names.add(folder.name)
    assert len(names) == len(texts)


def test_an_unreadable_section_eval_counts_as_defaults(caplog):
    config = {**CONFIG, "eval": {"harness": {"limit": 3}}}
    assert conditions(config=config).differing == {}
    assert "eval" in caplog.text


# ---- files


def write(folder: Path, file: str, found: Conditions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    make_way(folder / file, found)
    (folder / file).write_text(json.dumps(found.record(file)))


def test_two_task_lists_have_two_folders(tmp_path):
    lists = [conditions(f"harness.tasks=[{names}]") for names in ("a", "a, b", "c")]
    folders = []
    for found in (*lists, *lists):
        folder, found = choose_folder(tmp_path / STEP, found)
        write(folder, "results.json", found)
        folders.append(folder)
    assert folders[0] == tmp_path / STEP and len(set(folders)) == 3
    assert folders[:3] == folders[3:], "the same options replace their own result"
    # The validation loss does not depend on the tasks.
    assert choose_folder(tmp_path / STEP, conditions())[0] == tmp_path / STEP


def test_a_folder_of_the_user_keeps_earlier_results(tmp_path, caplog):
    file = tmp_path / "validation.json"
    older = '{"loss/val": 3.0}'
    file.write_text(older)
    first, other = conditions("harness=null"), conditions("loop_count=4")
    elsewhere = replace(first, checkpoint="elsewhere")
    for found in (first, other, elsewhere, elsewhere):
        write(tmp_path, file.name, found)
    assert (tmp_path / "validation.old-1.json").read_text() == older
    kept = [json.loads((tmp_path / f"validation.old-{n}.json").read_text()) for n in (2, 3)]
    assert [record["made_with"]["loop_count"] for record in kept] == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "validation.json"
    assert len(list(tmp_path.iterdir())) == 4
    assert "loop_count=2" in caplog.text


def test_a_result_older_than_exits_is_kept_beside_one_with_an_exit(tmp_path):
    older = conditions()
    del older.options["exit"]
    for found in (older, conditions("exit=kl:0.1")):
        write(tmp_path, "validation.json", found)
    kept = json.loads((tmp_path / "validation.old-1.json").read_text())
    assert "exit" not in kept["made_with"]


def test_a_cache_of_answers_belongs_to_one_model(tmp_path):
    file = tmp_path / "consolidated.pth"
    file.write_text("a")
    found = replace(conditions(TASKS), checkpoint=str(file))
    again = replace(conditions(TASKS), checkpoint=str(file))
    assert found.digest(of_model=True) == again.digest(of_model=True)
    other = replace(conditions(TASKS, "loop_count=4"), checkpoint=str(file))
    assert other.digest(of_model=True) != found.digest(of_model=True)
    assert other.digest(of_model=False) == found.digest(of_model=False)
    changed = replace(conditions("harness.tasks=[{task: a, num_fewshot: 1}]"), checkpoint=str(file))
    assert changed.digest(of_model=False) != found.digest(of_model=False)
    before = found.digest(of_model=True)
    os.utime(file, ns=(1, 1))  # trained again
    assert found.digest(of_model=True) != before


def test_names_in_wandb_name_other_options():
    scores = {"evals": {"a": {"acc,none": 0.5, "alias": "a"}}, "validation": {"loss/val": 2.0}}
    found = conditions(TASKS, "loop_count=4", "harness.limit=8")
    flat = flatten_scores(scores, found)
    assert flat["evals/loop_count=4,limit=8/a/acc,none"] == 0.5
    assert flat["validation/loop_count=4/loss/val"] == 2.0
    made_with = json.loads(flat["evals/loop_count=4,limit=8/made_with"])["made_with"]
    assert made_with["loop_count"] == 4 and made_with["harness.limit"] == 8
    assert flatten_scores(scores, conditions(TASKS))["evals/a/acc,none"] == 0.5


# ---- a run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data/local").mkdir(parents=True)
    text = json.dumps({"text": " ".join(random.Random(0).choices(WORDS, k=40))})
    Path("data/local/text.val.jsonl").write_text(text)
    data = {"tokenizer": {"name": "bytes"}, "root_dir": "data", "sources": {"local": 1.0}}
    model = tiny_model("full", 2, n_layers=1, max_seqlen=64)
    save_run(tmp_path / "r", model, 7, data={**data, "seq_len": 64})
    (tmp_path / "r" / "config.yaml").write_text("model: {loop_count: 2}\n")
    return tmp_path / "r"


def evaluate(*options: str) -> float:
    with clean_process():
        scores = launch_eval(parse_args(EvalArgs, ["generator.device=cpu", *options]))
    return scores["validation"]["loss/val"]


def test_sweep_and_plot_read_all_results(run):
    from apps.LT2.scripts.plot_loss import read_curve

    own = evaluate("ckpt_dir=r", "loop_count=2")
    before = (run / "evals" / STEP / "validation.json").read_bytes()
    other = evaluate("ckpt_dir=r", "loop_count=4")
    assert own != other
    assert (run / "evals" / STEP / "validation.json").read_bytes() == before
    found = json.loads((run / "evals" / f"{STEP}-loop_count=4" / "validation.json").read_text())
    assert found["loss/val"] == other and found["made_with"]["loop_count"] == 4

    (run / "metrics.jsonl").write_text('{"global_step": 9, "loss/out": 1.0}\n')
    curve = read_curve(run)
    assert curve.val == [(7, own)] and curve.others == {"loop_count=4": [(7, other)]}
    table = build_table(read_runs([run]))
    cells = {column.name: column.cells[0] for column in table.columns}
    assert cells["val"] == (own, 7) and cells["eval val loop_count=4"] == (other, 7)
    assert f"| {own:.4f} @7 |" in format_as(table, "markdown")


def test_older_records_are_not_taken_for_the_own_options(run):
    (run / "metrics.eval.jsonl").write_text('{"global_step": 7, "a": {"acc,none": 0.5}}\n')
    (found,) = read_evaluations(run)
    assert (found.step, found.label, found.scores) == (7, UNKNOWN, {"a/acc,none": 0.5})
    assert f"a acc {UNKNOWN}" in format_as(build_table(read_runs([run])), "csv")


def test_checkpoints_of_several_runs_side_by_side(run, monkeypatch):
    for name in ("a", "b"):
        (run.parent / "all" / name).mkdir(parents=True)
        (run.parent / "all" / name / STEP).symlink_to(run / "checkpoints" / STEP)
        evaluate(f"ckpt_dir=all/{name}/{STEP}")
        assert (run.parent / "all" / name / "evals" / STEP / "validation.json").exists()
    monkeypatch.chdir(run / "checkpoints" / STEP)
    evaluate("ckpt_dir=.", "validation.root_dir=../../../data", "validation.sources=[local]")
    assert len(list((run / "evals").iterdir())) == 1


def test_a_result_that_was_moved_by_hand_is_a_user_error(tmp_path):
    found = conditions("loop_count=4")
    write(tmp_path / f"{STEP}-loop_count=4", "validation.json", conditions("loop_count=1"))
    with pytest.raises(UserError, match="loop_count=1"):
        choose_folder(tmp_path / STEP, found)
