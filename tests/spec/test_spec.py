"""The text of the specification runs as it is written.

train.yaml and model.yaml are its configs, commands.sh holds its commands. Tests change only sizes,
steps, paths and fsdp. The Hub, conda and SLURM are replaced by stand-ins. Commands that need 8 GPUs
or an evaluation suite run up to the point where they need it.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import apps.LT2.train
import lingua.stool
from apps.LT2 import benchmark_prefill, eval, generate
from apps.LT2.benchmark.timing import Ceilings
from apps.LT2.evaluation.args import EvalArgs
from apps.LT2.train import TrainArgs
from apps.LT2.transformer import build_on_meta
from lingua.args import load_config_file, parse_args
from lingua.config.yaml import yaml_value
from lingua.errors import UserError
from lingua.stool import StoolArgs, read_run_args
from tests.LT2.tiny_run import clean_process, column, without_code_copy
from tests.setup_scripts import load_script

SPEC = Path(__file__).parent
ROOT = SPEC.parents[1]
STAND_INS = {
    "<MEMORY>": "1",
    "<NCHUNKS>": "8",
    "<SAVE_PATH>": "tokenizer",
    "<HUGGINGFACE_TOKEN>": "hf_secret",
    "<partition>": "gpu",
    "<your_partition>": "gpu",
    "/path/to/checkpoint": "run/checkpoints/0000000002",
    "path/to/dump_dir": "debug",
}
SIZES = [
    *("model.dim=32", "model.n_layers=5", "data.batch_size=2", "data.seq_len=32"),
    "eval.validation.max_steps=1",  # of 10,000 documents
]
SOURCE = "./data/fineweb_edu_shuffled"
PATHS = [f"data.root_dir={SOURCE}", "dump_dir=run"]
# Instead of the paths of the recipes.
DATA = [
    "data.root_dir=data",
    "data.sources={fineweb_edu_shuffled: 1.0}",
    "data.tokenizer.name=tiktoken",
    "data.tokenizer.path=tokenizer/original/tokenizer.model",
]
LLAMA3_VOCAB = 128_256


def commands() -> list[list[str]]:
    """Return the words of each command, with stand-ins for what the reader fills in."""
    text = (SPEC / "commands.sh").read_text().replace("\\\n", " ")
    for name, value in STAND_INS.items():
        text = text.replace(name, value)
    return [shlex.split(line) for line in text.splitlines()]


COMMANDS = commands()


# ---- stand-ins


class Hub:
    """Replaces huggingface_hub: two files of documents, and a tokenizer of the 256 bytes."""

    def HfApi(self) -> Hub:
        return self

    def dataset_info(self, repo_id: str, **_: Any) -> Any:
        assert repo_id == "HuggingFaceFW/fineweb-edu"
        sink = pyarrow.BufferOutputStream()
        texts = pyarrow.table({"text": [f"document {i}" for i in range(5100)]})
        pyarrow.parquet.write_table(texts, sink)
        self.content = sink.getvalue().to_pybytes()
        self.names = ["data/CC-MAIN-2024/0.parquet", "data/CC-MAIN-2024/1.parquet"]
        siblings = [SimpleNamespace(rfilename=n, size=len(self.content)) for n in self.names]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def snapshot_download(self, repo_id: str, *, local_dir: Path, **_: Any) -> None:
        for name in self.names:
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes(self.content)

    def hf_hub_download(self, repo_id: str, *, filename: str, local_dir: str, token: str) -> str:
        assert repo_id == "meta-llama/Meta-Llama-3-8B" and token == "hf_secret"
        lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
        file = Path(local_dir, filename)
        file.parent.mkdir(parents=True)
        file.write_text("".join(lines))
        return str(file)


# Commands that the scripts of the specification start. `conda` makes an environment whose python
# installs nothing; sbatch checks its script.
PROGRAMS = {
    "sbatch": '[[ -f $1 ]] && bash -n "$1" && echo "sbatch $1" >> called',
    "conda": """
env=$PWD/environment
echo "conda $*" >> called
case $* in
    create*) mkdir -p "$env/bin" && cp bin/env_python "$env/bin/python" ;;
    run*python\\ -c*) echo "$env" ;;
    run*) [[ -f $env/bin/python ]] ;;
esac""",
    # The programs on stdin look for torch and triton.
    "env_python": f"""
echo "python $*" >> called
[[ $1 == -m || $1 == - ]] || {sys.executable} "$@" """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """The current folder of this module, with data and tokenizer from the commands."""
    folder = tmp_path_factory.mktemp("LT2")
    for path in (ROOT / "apps", ROOT / "setup", *ROOT.glob("*.toml"), *ROOT.glob("req*.txt")):
        (folder / path.name).symlink_to(path)
    (folder / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        for script in ("download_prepare_hf_data", "download_tokenizer"):
            module = load_script(script)
            patch.setattr(module, "import_optional", lambda *_, **__: Hub())
            (words,) = [words for words in COMMANDS if words[1] == f"setup/{script}.py"]
            module.main(words[2:])
        yield folder


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """The typical run, trained for two steps."""
    compiled = []

    def compile(function: Callable, **_: Any) -> Callable:
        compiled.append(function)  # tests/LT2/test_compile.py compiles
        return function

    options = [*SIZES, *PATHS, "steps=2", "distributed.fsdp_type=no_shard"]
    args = parse_args(TrainArgs, [f"config={SPEC / 'train.yaml'}", *options])
    with pytest.MonkeyPatch.context() as patch, clean_process(), without_code_copy():
        patch.setattr(torch, "compile", compile)
        apps.LT2.train.train(args)
    assert len(compiled) == 5
    return folder / "run"


# ---- configs


def get(args: Any, option: str) -> Any:
    return reduce(getattr, option.split("."), args)


def assert_set(args: Any, options: dict[str, Any], prefix: str = "") -> None:
    """Compare every value of a YAML file with the options that were read."""
    for name, value in options.items():
        if isinstance(value, dict):
            assert_set(args, value, f"{prefix}{name}.")
        else:
            assert get(args, prefix + name) == value, prefix + name


@pytest.mark.parametrize("file", ["train.yaml", "model.yaml"])
def test_the_file_is_read_as_it_is(file):
    args = parse_args(TrainArgs, [f"config={SPEC / file}", f"model.vocab_size={LLAMA3_VOCAB}"])
    assert_set(args, load_config_file(SPEC / file))
    model = build_on_meta(args.model)
    assert [len(loop) for loop in model.layout] == [20] * 4
    for loop in model.layout:
        assert [i for i, spec in enumerate(loop) if spec.mixer == "full"] == [4, 9, 14, 19]
        assert {spec.mixer for spec in loop} == {"gdn", "full"}
    (attention,) = model.layers[4].mixers()
    (gdn,) = model.layers[0].mixers()
    assert (attention.n_heads, attention.head_dim) == (16, 128)
    assert (gdn.n_heads, gdn.key_dim, gdn.value_dim) == (16, 96, 192)
    assert (attention.wg is not None) == (file == "model.yaml")


def test_the_typical_run_trains(run):
    losses = column(run, "loss/out")
    assert len(losses) == 1 and losses[0] == pytest.approx(math.log(512), abs=1)
    assert (run / "checkpoints/0000000002/.metadata").is_file()
    config = load_config_file(run / "config.yaml")
    assert config["optim"]["lr_min_ratio"] == 1e-6 and config["seed"] == 777


def test_the_raw_download_is_not_a_source(folder):
    """The file names the folder of the download; the prepared folder is beside it."""
    args = parse_args(TrainArgs, [f"config={SPEC / 'train.yaml'}", "dump_dir=raw"])
    with pytest.raises(UserError, match="fineweb_edu_shuffled"):
        apps.LT2.train.validate_train_args(args, 1)


def test_the_fragment_trains_with_another_backend(folder):
    """fmha needs a GPU."""
    options = [*SIZES, f"data.root_dir={SOURCE}", "dump_dir=fragment", "steps=1"]
    command = [f"config={SPEC / 'model.yaml'}", *options, "data.load_async=false"]
    with clean_process(), without_code_copy():
        with pytest.raises(UserError, match=r"model\.attn_impl=fmha"):
            apps.LT2.train.train(parse_args(TrainArgs, command))
        apps.LT2.train.train(parse_args(TrainArgs, [*command, "model.attn_impl=auto"]))
    assert len(column(folder / "fragment", "loss/out")) == 1


def test_a_checkpoint_converts_to_one_file(run):
    dcp_to_torch_save(run / "checkpoints/0000000002", run / "whole.pt")
    weights = torch.load(run / "whole.pt")["model"]
    assert weights["rho"].shape == (4, 32)


# ---- commands


def called(folder: Path) -> list[str]:
    """Return the calls of the stand-ins."""
    return (folder / "called").read_text().splitlines()


def program_and_options(words: list[str]) -> tuple[str, list[str], int]:
    """Return the module of a python or torchrun command, its options, and the processes."""
    n_processes = int(words[2]) if words[:2] == ["torchrun", "--nproc-per-node"] else 1
    at = words.index("-m") + 1
    return words[at], words[at + 1 :], n_processes


def trains(words: list[str], folder: Path, capsys: Any) -> None:
    """All checks before the first step pass, and every option arrives."""
    _, options, n_gpus = program_and_options(words)
    config, *options = options
    given = StoolArgs(config=config.removeprefix("config="), nodes=1, ngpu=n_gpus)
    given.overrides = [*options, *DATA]
    args = read_run_args(given, apps.LT2.train)
    for option in options:
        name, _, text = option.partition("=")
        assert get(args, name) == yaml_value(text)


def submits(words: list[str], folder: Path, capsys: Any) -> None:
    """The debug job is written and submitted; the larger one is shown."""
    _, options, _ = program_and_options(words)
    dump_dir = "debug" if "nodes=1" in options else "large"
    options += ["dry_run=true"] if dump_dir == "large" else []
    lingua.stool.main([*options, "--", f"dump_dir={dump_dir}", *DATA])
    if dump_dir == "large":
        shown = capsys.readouterr().out
        assert "#SBATCH --nodes=8" in shown and not (folder / "large").exists()
        return
    assert called(folder)[-1] == f"sbatch {folder / 'debug/submit.slurm'}"
    for name in ("code/apps/LT2/train.py", "logs", "base_config.yaml", "submit.slurm"):
        assert (folder / "debug" / name).exists()
    assert "#SBATCH --partition=gpu" in (folder / "debug/submit.slurm").read_text()


def is_submitted(words: list[str], folder: Path, capsys: Any) -> None:
    """sbatch finds the script."""
    assert subprocess.run(["bash", "-c", shlex.join(words)]).returncode == 0
    assert called(folder)[-1] == shlex.join(words)


def creates_environment(words: list[str], folder: Path, capsys: Any) -> None:
    """conda gets an environment with the packages for GPUs. SLURM runs a copy of the script."""
    script = folder / words[1]
    if words[0] == "sbatch":
        script = Path(shutil.copy(script, folder / "slurm_script"))
    env = os.environ | {"SLURM_SUBMIT_DIR": str(folder)}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"conda activate lingua_{date.today():%y%m%d}"
    installed = " ".join(call for call in called(folder) if "pip install" in call)
    assert f"-r {folder}/requirements-gpu.txt" in installed and "[eval,wandb]" in installed


def prepared(words: list[str], folder: Path, capsys: Any) -> None:
    """The fixture has run it."""
    assert len(list(folder.glob("data/fineweb_edu_shuffled/*.chunk.*.jsonl"))) == 8


def downloaded(words: list[str], folder: Path, capsys: Any) -> None:
    path = load_config_file(SPEC / "train.yaml")["data"]["tokenizer"]["path"]
    assert (folder / path).is_file()


def generates(words: list[str], folder: Path, capsys: Any) -> None:
    _, options, _ = program_and_options(words)
    args = parse_args(generate.GenerateArgs, options)
    assert (args.max_gen_len, args.temperature) == (256, 0.7)
    generate.main([*options, "max_gen_len=4", "prompts=[Once]"])
    assert capsys.readouterr().out.startswith("Once")


def evaluates(words: list[str], folder: Path, capsys: Any) -> None:
    """Up to the suites, whose data would be downloaded."""
    _, options, _ = program_and_options(words)
    args = eval.resolve(parse_args(EvalArgs, options))
    assert args.harness is not None and "hellaswag" in args.harness.tasks
    assert args.global_step == 2


def benchmarks(words: list[str], folder: Path, capsys: Any) -> None:
    _, options, _ = program_and_options(words)
    assert benchmark_prefill.parse_options(options)[0].seq_len == [8192]
    small = ["--seq-len", "16", "--batch-size", "1", "--repeats", "1", "--warmup", "1"]
    small += ["--decode-tokens", "2", "model.dim=32", "model.n_layers=5", "model.vocab_size=300"]
    with pytest.MonkeyPatch.context() as patch:
        ceilings = Ceilings(copy_bytes_per_s=1e9, matmul_flops=1e10, datasheet_flops=None)
        patch.setattr(benchmark_prefill, "measure_ceilings", lambda *_: ceilings)
        benchmark_prefill.main([*options, *small, "model.n_heads=2"])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["prefill"]["tokens_per_s"] > 0 and row["decode"]["tokens_per_s"] > 0


CHECKS: dict[str, Callable[[list[str], Path, Any], None]] = {
    "bash setup/create_env.sh": creates_environment,
    "sbatch setup/create_env.sh": creates_environment,
    "conda activate": lambda words, folder, _: None,  # creates_environment prints it
    "python setup/download_prepare_hf_data.py": prepared,
    "python setup/download_tokenizer.py": downloaded,
    "python -m lingua.stool": submits,
    "torchrun --nproc-per-node 8 -m apps.LT2.train": trains,
    "python -m apps.LT2.train": trains,
    "sbatch debug/submit.slurm": is_submitted,
    "python -m apps.LT2.generate": generates,
    "torchrun --nproc-per-node 8 -m apps.LT2.eval": evaluates,
    "python -m apps.LT2.benchmark_prefill": benchmarks,
    "sbatch apps/LT2/slurm/benchmark_prefill_array.slurm": is_submitted,
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_command_does_what_it_says(words, folder, run, capsys):
    checks = [check for start, check in CHECKS.items() if shlex.join(words).startswith(start)]
    assert len(checks) == 1
    checks[0](words, folder, capsys)
