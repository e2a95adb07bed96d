"""Test the page of a run and of a folder of runs: its numbers, sections, escaping and width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.scripts import report as report_module
from apps.LT2.scripts.figure import Line
from apps.LT2.scripts.report import main
from apps.LT2.scripts.report_data import resume_command, status
from lingua.args import config_as_yaml
from lingua.errors import UserError
from lingua.runs import STEP, read_runs
from lingua.tokenizer import ByteTokenizer
from tests.LT2.tiny import save_run, tiny_model

pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("jinja2")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MODEL = {"dim": 64, "n_layers": 3, "loop_count": 2, "mixer": "gdn", "vocab_size": 300}
CONFIG = {
    "name": "demo",
    "steps": 40,
    "seed": 7,
    "grad_acc_steps": 2,
    "model": MODEL | {"attention_pattern": "gdn,full,gdn"},
    "data": {"batch_size": 4, "seq_len": 128, "root_dir": "data", "sources": {"local": 1.0}}
    | {"tokenizer": {"name": "hf", "path": "tokenizer.json"}},
    "distributed": {"dp_replicate": 2, "dp_shard": 1, "tp_size": 1},
    "optim": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1, "scheduler": "cosine"},
}
FACTS = {"model/parameters": 1234567, "model/flops_per_token": 1000}
FACTS |= {"environment/versions": "Python 3.11.7, torch 2.13.0"}
LOSSES = [6.0, 4.0, 3.0, 3.5]


def records(*, losses: list = LOSSES, facts: bool = True, val: bool = True) -> list[dict]:
    found: list[dict[str, Any]] = []
    for i, loss in enumerate(losses, start=1):
        record = {"created_at": f"2026-11-29T10:0{i}:00+00:00", "global_step": 10 * i}
        record |= {"loss/out": loss, "optim/lr": 0.001 * i, "optim/grad_norm": 1.0 / i}
        record |= {"speed/tokens_per_s": 1000.0 * i, "optim/total_tokens": 20480 * i}
        if facts:
            record |= {"optim/total_flops": 2.048e7 * i, "time/elapsed": 1800.0 * i}
            record |= FACTS if i == 1 else {}
        found.append(record)
        if val and i % 2 == 0:
            found.append({"global_step": 10 * i, "loss/val": loss + 0.25, "loss/val_bpb": 1.5})
    return found


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, lines: list[dict], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_as_yaml(CONFIG | changes))
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def add_everything(run: Path) -> None:
    """Add what only some runs have: probes, evaluations, recorded answers, versions."""
    with open(run / "metrics.jsonl", "a") as file:
        for step in (0, 20):
            stats = {f"loops/residual_rms/{i}": 1.5 + i + step for i in range(2)}
            stats |= {f"layers/grad_norm/{i}": 0.5 + i for i in range(3)}
            file.write(json.dumps({"global_step": step, "loops/rho/1": 0.25} | stats) + "\n")
    scores = {"acc,none": 0.4375, "acc_stderr,none": 0.0625, "sample_len": 16}
    made = {"made_with": {"dtype": "fp32"}, "differs_from_run": {"loop_count": 4}}
    evaluation = {"global_step": 40, "quiz": scores, "chance": {"quiz": {"acc": 0.25}}}
    write_lines(run / "metrics.eval.jsonl", [evaluation | made])
    validation = {"global_step": 40, "loss/val": 3.75, "made_with": {}, "differs_from_run": {}}
    write_lines(run / "metrics.validation.jsonl", [validation])
    version = {"commit": "0123456789abcdef", "dirty": True, "root": "/home/user/" + 40 * "LT2"}
    (run / "code_version.json").write_text(json.dumps(version))
    (run / "train.log").write_text("0: INFO - run demo\n    devices  2 x CPU, float32\n")
    answers = run / "evals" / "0000000040"
    answers.mkdir(parents=True)
    request = {"gen_args_0": {"arg_0": "Copy: a b", "arg_1": {"until": ["\n"]}}}
    sample = {"arguments": request, "target": "a b", "resps": [["a <b>"]]}
    choice = {"arguments": {"gen_args_0": {"arg_0": "Choose", "arg_1": " this"}}}
    write_lines(answers / "samples_copy_2026.jsonl", [sample] * 5)
    write_lines(answers / "samples_quiz_2026.jsonl", [choice | {"target": 1, "resps": [[1]]}])


class Page(HTMLParser):
    """The text of a page, by the heading above it, and all elements."""

    def __init__(self, file: Path):
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.sections: dict[str, str] = {"": ""}
        self.tags: list[str] = []
        self.open: list[str] = []
        self.at = ""
        self.feed(self.html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "use", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "use"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.at = data
        elif "style" not in self.open:
            self.sections[self.at] = self.sections.get(self.at, "") + " ".join(data.split()) + " "

    @property
    def text(self) -> str:
        return " ".join(map(self.__getitem__, self.sections))

    def __getitem__(self, heading: str) -> str:
        return re.sub(r"\s+", " ", self.sections[heading])


def report(*args: object) -> Page:
    main(list(map(str, args)))
    folder = Path(str(args[0]))
    return Page(folder / "report.html")


@pytest.fixture
def sketched(monkeypatch):
    """Replace plots, which take 0.3 s each, by empty elements."""
    monkeypatch.setattr(report_module, "svg", lambda *args, **options: "<svg></svg>")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Page:
    run = write_run(tmp_path_factory.mktemp("runs") / "demo", records())
    add_everything(run)
    return report(run)


def test_main_numbers(full):
    assert "finished: 40 of 40 steps" in full[""]
    for text in (
        "parameters 1,234,567",
        "training tokens 81,920",
        "training FLOPs 8.19e7",
        "training time 2:00:00",
        "training loss 3.5000 step 40; lowest 3.0000 at 30",
        "validation loss 3.7500 step 40; the lowest",
        "tokens/s 2,500 median; last 4,000",
    ):
        assert text in full[""]
    assert "Not recorded" not in full[""]


def test_options_environment_and_resume(full):
    assert "3 layers x 2 loops, dim 64" in full["What was trained"]
    assert "2,048: batch_size 4 x seq_len 128 x grad_acc_steps 2" in full["What was trained"]
    environment = full["Environment"]
    assert "0123456789abcdef, with uncommitted changes" in environment
    assert "2 x CPU, float32" in environment and "Python 3.11.7, torch 2.13.0" in environment
    assert "2026-11-29 10:01 UTC to 2026-11-29 10:04 UTC" in environment
    assert "torchrun --nproc-per-node 2 -m apps.LT2.train config=" in full["Resume"]


@pytest.mark.parametrize(
    "changes, moved",
    [
        ({}, ""),
        ({"dump_dir": "{run}", "checkpoint": {"path": "{run}/checkpoints"}}, ""),
        ({"dump_dir": "/old/a"}, " dump_dir={run} checkpoint.path=null"),
        (
            {"dump_dir": "/old/a", "checkpoint": {"path": "/old/a/ckpt"}},
            " dump_dir={run} checkpoint.path=null",
        ),
        ({"dump_dir": "/old/a", "checkpoint": {"path": "/scratch"}}, " dump_dir={run}"),
    ],
)
def test_a_moved_run_resumes_where_it_is(changes, moved, tmp_path):
    folder = tmp_path / "run"
    write_run(folder, records(), **json.loads(json.dumps(changes).replace("{run}", str(folder))))
    command = resume_command(read_runs([folder])[0])
    assert command.partition("config=")[2] == f"{folder}/config.yaml{moved}".replace(
        "{run}", str(folder)
    )


def test_a_run_of_stool_resumes_with_its_script(tmp_path):
    folder = write_run(tmp_path / "run", records())
    (folder / "submit.slurm").touch()
    assert resume_command(read_runs([folder])[0]).startswith(f"sbatch {folder}/submit.slurm")


def test_layout_has_a_cell_for_each_loop_and_layer(full):
    assert "loop 0 g F g loop 1 g F g g gdn (4) F full (2)" in full["Layout"]


def test_probes_and_evaluations(full):
    assert "step 20 loop 0 loop 1 RMS of the residual stream" in full["Probes"]
    assert "21.5 22.5" in full["Probes"]
    scores = full["Evaluations"]
    assert "Step 40, loop_count=4" in scores and "the run's own options" in scores
    assert "quiz acc 0.4375 ± 0.0625 0.2500 16" in scores
    assert "held-out text nats per token 3.7500" in scores
    assert scores.count("expected: a b Copy: a b a <b>") == 2 and "Choose" not in scores
    assert full.tags.count("svg") == 7  # loss, lr, gradient norm, speed, three probes


def test_the_page_is_one_file(full):
    assert not {"script", "link", "img", "iframe", "object"} & set(full.tags)
    assert not re.search(
        r"https?:|//\w|@import|\bsrc=|url\((?!#)", full.html.split("Environment")[0]
    )


def test_a_folder_of_runs(tmp_path, sketched):
    """The third run failed before its first record. The page has the rows in order of the seed."""
    for seed in (3, 1, 2):
        lines = records(losses=[6.0, 5.0 + seed]) if seed < 3 else []
        write_run(tmp_path / "runs" / f"run{seed}", lines, seed=seed)
    (tmp_path / "runs" / "run3" / "train.log").write_text("ERROR - the run ends: no disk\n")
    (tmp_path / "runs" / "run3" / "metrics.jsonl").unlink()
    page = report(tmp_path / "runs")
    assert re.search(r"1 run1 1 stopped .* 6\.0000 .* 2 run2 2 stopped .* 7\.0000", page[""])
    assert "3. run3, failed: 0 of 40 steps; no disk" in page.text
    assert page.html.count('href="#run-3"') == page.html.count('id="run-3"') == 1
    assert page.tags.count("svg") == 2 + 2 * 4  # one validation makes no curve


def test_many_runs_have_no_plots_of_their_own(tmp_path, sketched, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_PLOTTED", 1)
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"run{seed}", records(), seed=seed)
    page = report(tmp_path / "runs")
    assert page.tags.count("svg") == 4 and "A report of this run alone" in page["Curves"]


def test_answers_to_given_prompts(tmp_path, sketched):
    save_run(tmp_path, tiny_model("hybrid", 2))
    write_lines(tmp_path / "metrics.jsonl", records())
    options = ["generator.temperature=0", "generator.max_gen_len=6", "generator.device=cpu"]
    page = report(tmp_path, "prompts=[first, third one]", *options)
    args = PackedCausalTransformerGeneratorArgs(max_gen_len=6)
    generator = PackedCausalTransformerGenerator(args, tiny_model("hybrid", 2), ByteTokenizer())
    first, third = generator.generate(["first", "third one"])[0]
    shown = " ".join(f"first{first} third one{third}".split())
    assert shown.replace(" ", "") in page["Samples"].replace(" ", "")


def test_names_are_escaped(tmp_path):
    evil = '<script>alert("1")<script>&$x^$'  # also not mathematics
    for i in range(2):
        lines = [{"global_step": step, "loss/out": 1.0} for step in (10, 20)]
        run = write_run(tmp_path / "runs" / f"{evil}{i}", lines, name=evil, seed=f"{evil}{i}")
        write_lines(run / "metrics.eval.jsonl", [{"global_step": 1, evil: {"acc,none": 0.5}}])
    page = report(tmp_path / "runs")
    assert "script" not in page.tags and "<script" not in page.html
    assert page.html.count("&lt;script&gt;") > 10
    ids = re.findall(r' id="([^"]*)"', page.html)
    assert len(set(ids)) == len(ids), "a plot in a closed section would clip others"


@pytest.mark.parametrize(
    "lines, missing, n_plots",
    [
        (records(facts=False), "parameters, training FLOPs, training time", 4),
        (records(val=False), "validation loss, bits per byte", 4),
        (records(losses=[5.0]), "validation loss, bits per byte", 4),
        (records(losses=[None, None], val=False), "bits per byte", 3),
        ([{"global_step": 0, "loss/val": 5.0}], "tokens/s", 1),
    ],
    ids=["older", "no validation", "one record", "not finite", "only validation"],
)
def test_runs_with_less(lines, missing, n_plots, tmp_path, sketched):
    page = report(write_run(tmp_path / "run", lines))
    assert missing in page[""].partition("Not recorded:")[2]
    assert page.tags.count("svg") == n_plots
    assert "No results of apps.LT2.eval" in page["Evaluations"]


def test_a_run_without_a_config(tmp_path, sketched):
    write_lines(tmp_path / "metrics.jsonl", records())
    page = report(tmp_path)
    assert "no readable section model" in page["Layout"] and "training loss 3.5000" in page[""]


def test_a_curve_of_one_point_is_a_marker():
    assert "<use" in report_module.svg([Line([10.0], [5.0])], STEP, "loss", "Loss")


def test_a_run_that_is_training(tmp_path):
    folder = write_run(tmp_path / "run", records(losses=[5.0, 4.0]))
    (run,) = read_runs([folder])
    assert status(run) == "stopped: 20 of 40 steps"
    lock = "import sys; from lingua.files.lock import lock_folders as lock\n"
    lock += "with lock({'dump_dir': sys.argv[1]}): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", lock, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        (run,) = read_runs([folder])
        assert status(run) == "running: 20 of 40 steps"


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no run given"),
        (["empty"], "no run in it"),
        (["missing"], "does not exist"),
        (["waiting"], "metrics.jsonl"),
        (["one", "two"], "out="),
        (["on*"], "out="),
        (["one", "out=page"], "out="),
        (["one", "out=/proc/none/a.html"], "out="),
        (["one", "two", "out=a.html", "prompts=[Hello]"], "prompts="),
    ],
)
def test_mistakes(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name, lines in (("waiting", []), ("one", records()), ("two", records())):
        write_run(Path(name), lines)
    with pytest.raises(UserError, match=message):
        main(argv)
    assert not list(tmp_path.rglob("*.html"))


# Writes what the browser sees into the page's title.
LOOK = """<script>
const height = svg => svg.getBoundingClientRect().height;
const drawn = [...document.querySelectorAll("svg")].filter(svg => height(svg) > 99);
document.title = JSON.stringify({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  drawn: drawn.length,
  fetched: performance.getEntriesByType("resource").length,
  cells: document.querySelectorAll(".layout td").length,
});
</script>"""


def test_a_browser_shows_the_page_in_a_narrow_window(full, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium")
    page = tmp_path / "page.html"
    page.write_text(full.html.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --dump-dom "
    options += f"--disable-background-networking --window-size=500,900 --user-data-dir={tmp_path}"
    command = [browser, *options.split(), page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*)</title>", shown.stdout)
    assert title, shown.stderr
    seen = json.loads(title[1])
    assert seen == {"overflow": 0, "drawn": 7, "fetched": 0, "cells": 6}
