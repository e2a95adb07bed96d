"""Tasks are named by mappings too, and everything that can be known is checked before scoring."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from apps.LT2.evaluation.args import LMHarnessArgs
from apps.LT2.evaluation.tasks import is_connection_error, load_tasks, use_cache_without_network
from apps.LT2.inference.generator import PackedCausalTransformerGeneratorArgs
from lingua.errors import UserError
from lingua.tokenizer import TokenizerArgs

pytest.importorskip("lm_eval")

DATA = """
import datasets
from lm_eval.api.task import ConfigurableTask

def rows(**_):
    row = {"a": "4", "choices": ["4", "5"], "gold": 0}
    return {"test": datasets.Dataset.from_list([{"q": f"2+2 ({i})", **row} for i in range(6)])}

def broken(doc, results):
    raise RuntimeError("no scorer")

class Python(ConfigurableTask):
    def __init__(self, **_):
        choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}"}
        choice |= {"doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
        super().__init__(config={"custom_dataset": rows, "test_split": "test", **choice})
"""
HEAD = "tag: both\ncustom_dataset: !function data.rows\ntest_split: test\n"
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, top_k: -1}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
process_results: !function data.SCORE
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    good = "def good(doc, results):\n    return {'acc': float(results[0] == doc['a'])}\n"
    (root / "data.py").write_text(DATA + good)
    bodies = {"choice": CHOICE, "generate": GENERATE.replace("SCORE", "good")}
    for name, body in bodies.items():
        (root / f"{name}.yaml").write_text(f"task: {name}\n{HEAD}{body}")
    (root / "all.yaml").write_text("group: all\ntask: [choice, {group: inner, task: [generate]}]\n")
    (root / "python.yaml").write_text("task: python\nclass: !function data.Python\n")
    broken = GENERATE.replace("SCORE", "broken")
    (root / "broken.yaml").write_text(f"task: broken\n{HEAD.replace('both', 'other')}{broken}")
    return root


def load(folder: Path, *tasks, tokenizer: str = "bytes", **options):
    args = LMHarnessArgs(tasks=list(tasks), include_path=str(folder), verbosity="ERROR", **options)
    generator = PackedCausalTransformerGeneratorArgs()
    return load_tasks(args, generator, TokenizerArgs(name=tokenizer), 4096).load([])


@pytest.mark.parametrize(
    "spec, names",
    [
        ("choice", ["choice"]),
        ({"task": "choice", "num_fewshot": 3}, ["choice"]),
        ({"task": "both", "num_fewshot": 3}, ["choice", "generate"]),
        ({"group": "all", "num_fewshot": 3}, ["choice", "generate"]),
        ({"task": "all", "num_fewshot": 3}, ["choice", "generate"]),
        ({"task": "python", "num_fewshot": 3}, ["python"]),
        ({"group": "mine", "task": ["choice", {"task": "generate"}]}, ["choice", "generate"]),
        ("ch*", ["choice"]),
    ],
)
def test_an_entry_is_a_name_or_a_name_with_settings(folder, spec, names):
    tasks = load(folder, spec)["tasks"]
    assert sorted(tasks) == names
    for name, task in tasks.items():
        assert task.config.task == name and len(task.eval_docs) == 6
        wanted = spec.get("num_fewshot") if isinstance(spec, dict) else None
        assert task.get_config("num_fewshot") == wanted


def test_a_mapping_decides_before_the_option(folder):
    tasks = load(folder, {"task": "choice", "num_fewshot": 2}, "generate", num_fewshot=1)["tasks"]
    assert [task.get_config("num_fewshot") for task in tasks.values()] == [2, 1]


def test_loading_does_not_change_the_options(folder):
    spec = {"task": "generate", "generation_kwargs": {"max_gen_toks": 2, "temperature": 1}}
    before = json.dumps(spec)
    load(folder, spec)
    assert json.dumps(spec) == before


def generate(**settings):
    return {"task": "generate", "generation_kwargs": settings}


MISTAKES = [
    ("generate", [generate(repetition_penalty=1.1)], {}),
    ("generate", [generate(temperature=-1)], {}),
    ("generate", [generate(temperature="hot")], {}),
    ("generate", [generate(top_k=2.5)], {}),
    ("generate", [generate(top_k=-2)], {}),
    ("generate", [generate(top_p=0)], {}),
    ("generate", [generate(until=[1])], {}),
    ("generate", [generate(max_gen_toks="many")], {}),
    ("generate", ["choice", "generate"], {"gen_kwargs": {"typical_p": 0.5}}),
    ("generate", [{"task": "generate", "doc_to_image": "q"}], {}),
    ("broken", ["choice", "broken"], {}),
    ("choice", [{"task": "choice", "num_fewshots": 3}], {}),
    ("choice", [{"task": "choice", "num_fewshot": "3"}], {}),
    ("choice", [{"task": "choice", "num_fewshot": 7}], {}),
    ("choice", [{"task": "choice", "doc_to_text": "{{nothing.x}}"}], {}),
    ("choice", [{"task": "choice", "description": "{{nothing.x}}"}], {}),
    ("choice", [{"task": "choice", "unsafe_code": True}], {}),
    ("choice", ["choice", {"task": "choice", "num_fewshot": 3}], {}),
    ("python", [{"task": "python", "doc_to_text": "other"}], {}),
    ("choise", [{"task": "choise", "num_fewshot": 3}], {}),
    ("apply_chat_template", ["choice"], {"apply_chat_template": True}),
    ("none found", [{"group": "mine", "task": []}], {}),
]


@pytest.mark.parametrize("named, tasks, options", MISTAKES, ids=lambda value: str(value)[:40])
def test_what_can_be_known_is_checked_and_named(folder, monkeypatch, named, tasks, options):
    import lm_eval.tasks

    known = lm_eval.tasks.TaskManager
    monkeypatch.setattr(  # reading all files of the harness is slow
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, metadata, **_: known(
            include_path=include_path, include_defaults=False, metadata=metadata
        ),
    )
    with pytest.raises(UserError, match=f"^harness.*{named}") as refused:
        load(folder, *tasks, **options)
    assert "network" not in str(refused.value)


def test_an_unsafe_task_can_be_allowed_and_is_not_run_by_the_check(folder):
    unsafe = {"task": "broken", "unsafe_code": True}
    assert list(load(folder, unsafe, confirm_run_unsafe_code=True)["tasks"]) == ["broken"]


@pytest.mark.parametrize("tasks", [[], [""], [{}], [{"num_fewshot": 5}], [3]])
def test_an_entry_without_a_name_is_a_mistake(tasks):
    with pytest.raises(UserError, match=r"harness\.tasks"):
        LMHarnessArgs(tasks=tasks)


def test_samples_need_numbers():
    with pytest.raises(UserError, match=r"harness\.samples\.choice"):
        LMHarnessArgs(tasks=["choice"], samples={"choice": []})


def wrapped(error: Exception) -> Exception:
    outer = ValueError("cannot load")
    outer.__cause__ = error
    return outer


class ConnectError(Exception):  # as in httpx
    pass


@pytest.mark.parametrize(
    "error, is_offline",
    [
        (ConnectionRefusedError(), True),
        (socket.gaierror(), True),
        (TimeoutError(), True),
        (wrapped(ConnectError("no route")), True),
        (ValueError("bad task"), False),
        (wrapped(FileNotFoundError("d.json")), False),
        (json.JSONDecodeError("no", "", 0), False),
    ],
)
def test_only_connection_errors_advise_about_downloads(folder, monkeypatch, error, is_offline):
    import datasets

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets.Dataset, "from_list", fail)
    with pytest.raises(UserError, match="choice") as refused:
        load(folder, "choice")
    assert is_connection_error(error) is is_offline
    assert ("HF_HOME" in str(refused.value)) is is_offline


@pytest.mark.parametrize(
    "resolves, proxies, offline",
    [(True, {}, False), (False, {"https": "p:1"}, False), (False, {}, True)],
)
def test_the_hub_is_offline_if_its_name_is_unknown(monkeypatch, resolves, proxies, offline):
    from datasets import config
    from huggingface_hub import constants

    def look_up(host, port):
        assert host == "hub.example"
        if not resolves:
            raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("apps.LT2.evaluation.tasks.getproxies", lambda: proxies)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example/mirror")
    for module in (config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    use_cache_without_network()
    assert config.HF_HUB_OFFLINE is constants.HF_HUB_OFFLINE is offline
