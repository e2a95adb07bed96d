"""Run the commands of README and docs/*.md: every shell block in order, then the Python programs.

SMALLER and PLACEHOLDERS change commands that would take a GPU, a cluster, the network or minutes.
EXCEPTIONS are not run, each for the reason given.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.quick_python import QuickPython
from tests.readme import ROOT, Command, commands, programs

EXCEPTIONS = {
    "git clone": "needs the network",
    "cd LT2": "goes with git clone",
    "bash setup/quickstart.sh": "installs packages; `shell` runs its training in small",
    "source .venv": "goes with quickstart.sh",
    "bash setup/create_env.sh": "installs packages",
    "sbatch setup/create_env.sh": "installs packages",
    "conda activate": "goes with create_env.sh",
    "python setup/prepare_local_data.py": "`shell` runs it on a smaller library",
    "python setup/prepare_docs_corpus.py": "needs the network; tests/setup has its test",
    "python -m apps.LT2.lm_eval": "reads all tasks for 13 s; tests/LT2/test_eval.py runs it",
    "lm_eval run --model hf": "as above; tests/LT2/huggingface/test_lm_eval.py compares the scores",
    "python setup/download_tokenizer.py": "needs the network; tests/setup/test_download.py",
}

FAST_PYTHON = "anaconda=$(dirname $(dirname $(command -v python)))"

# Stand-ins for the reader's own values.
PLACEHOLDERS = {
    "<partition>": "gpu",
    "nodes=1 ngpu=1": f"nodes=1 ngpu=1 {FAST_PYTHON}",
    "launcher=bash": f"launcher=bash {FAST_PYTHON}",
    "'sweep.model.loop_count=[1,2,4]'": "'sweep.model.loop_count=[1,2]'",  # fewer runs
    "/path/to/run": "runs/quickstart",
    "prepare my_texts": "prepare data/local --out data/my_texts_shuffled",
    "[full,gdn,mamba2]": "[full,gdn]",
    "'sweep.seed=[1,2,3]'": "",
}

TINY_MODEL = "model.dim=32 model.n_layers=5 model.n_heads=2 model.gdn.head_dim=16"
# Few long batches: a batch of 64 tokens takes as long as one of 256.
TINY_RUN = (
    f"{TINY_MODEL} steps=2 data.batch_size=2 data.seq_len=256 data.load_async=false "
    "data.prefetch_size=2 checkpoint.eval.every=2 eval.validation.max_steps=1 logging.freq=1"
)
LOCAL_DATA = (
    '"data.sources={local: 1.0}" data.tokenizer.name=hf '
    "data.tokenizer.path=data/local/tokenizer.json"
)
TINY_BENCHMARK = "--seq-len 16 --batch-size 1 --repeats 1 --warmup 1 --decode-tokens 2"
TINY_RECIPE = "model.dim=32 model.n_layers=5 model.n_heads=2 model.vocab_size=300"
SHORT_ANSWERS = "generator.max_gen_len=4"
LOCAL_TASKS = "harness.tasks=[lt2_local_choice] harness.include_path=apps/LT2/local_tasks"

STUDY_MODEL = "model.dim=64 model.n_layers=2 model.gdn.head_dim=16"

# Start of a command -> what is appended to it; of two settings the last one counts.
SMALLER = {
    "python -m apps.LT2.train config=": f"{TINY_RUN} dump_dir=runs/train",
    "python -m apps.LT2.train config=apps/LT2/configs/600M/debug.yaml model.": TINY_RUN,
    "python -m apps.LT2.train config=apps/LT2/configs/600M/debug.yaml data.root_dir=": TINY_RUN,
    "python -m apps.LT2.train config=apps/LT2/configs/600M/debug.yaml optim.": TINY_RUN,
    "python -m apps.LT2.train config=apps/LT2/configs/1B": f"{TINY_RUN} model.loop_count=2",
    "python -m apps.LT2.train dump_dir=runs/pointers": (
        "model.dim=32 data.batch_size=2 data.load_async=false steps=2 eval.validation.max_steps=8"
    ),
    "python -m apps.LT2.train config=runs/from_hf/params.json": TINY_RUN,
    "torchrun --nproc-per-node 8 -m apps.LT2.train": f"{TINY_RUN} dump_dir=runs/torchrun",
    "torchrun --nproc-per-node 8 -m apps.LT2.train config=apps/LT2/configs/600M/looped": (
        f"{TINY_RUN} {LOCAL_DATA} model.loop_count=2 distributed.compile=false grad_acc_steps=1 "
        "dump_dir=runs/looped"
    ),
    "python setup/download_prepare_hf_data.py": (
        "--source_dir data/local --validation_documents 2 --nchunks 2"
    ),
    "python setup/tokenize_data.py": "--workers 1",
    "python -m apps.LT2.scripts.benchmark_loader": "--batches 2 --repeats 2 data.prefetch_size=2",
    "python -m apps.LT2.scripts.benchmark_checkpoint": (
        f"{TINY_RECIPE} model.loop_count=1 distributed.activation_checkpointing=none "
        "data.seq_len=16 data.batch_size=1 grad_acc_steps=1 --repeats 1 --steps 1"
    ),
    "python -m apps.LT2.scripts.benchmark_train": (
        f"{TINY_MODEL} data.batch_size=1 data.seq_len=32 data.load_async=false"
    ),
    "python -m lingua.stool script=": "ngpu=1 override=true",
    "python -m lingua.stool config=apps/LT2/configs/600M/debug.yaml launcher=bash": TINY_RUN,
    "python -m lingua.stool config=apps/LT2/configs/600M/debug.yaml launcher=bash array=2 match": (
        f"{TINY_RUN} {STUDY_MODEL}"
    ),
    "python -m apps.LT2.scripts.study permutation": "size=tiny",
    "python -m apps.LT2.generate": "max_gen_len=8",
    "python -m apps.LT2.eval": f"harness.limit=1 harness.bootstrap_iters=0 {SHORT_ANSWERS} "
    "validation.max_steps=1",
    "python -m apps.LT2.eval runs/quickstart 'loop_counts": "validation.max_steps=1",
    "python -m apps.LT2.eval runs/pointers": "validation.max_steps=8",
    "python -m apps.LT2.eval runs/gated": "validation.max_steps=1",
    "python -m apps.LT2.scripts.exit_sweep": (
        "validation.max_steps=1 exits=[gate:0.6] decode_tokens=2 prompt_tokens=2 repeats=1"
    ),
    # instead of tasks that would be downloaded
    "torchrun --nproc-per-node 8 -m apps.LT2.eval": (
        f"{LOCAL_TASKS} harness.limit=2 harness.bootstrap_iters=0 dump_dir=runs/suites"
    ),
    "python -m apps.LT2.benchmark_prefill --config apps/LT2/configs/600M": TINY_BENCHMARK,
    "python -m apps.LT2.benchmark_prefill": f"{TINY_BENCHMARK} {TINY_RECIPE}",
    "bash apps/LT2/scripts/benchmark_prefill_all.sh": f"{TINY_BENCHMARK} {TINY_RECIPE}",
    "bash apps/LT2/scripts/benchmark_train_all.sh": (
        f"{TINY_MODEL} --steps 3 --warmup 1 data.batch_size=1 data.seq_len=32 "
        "data.load_async=false distributed.compile=false"
    ),
}
ENVIRONMENT = {
    # for the scripts that measure all recipes, at all lengths
    "RECIPES": "apps/LT2/configs/1B/transformer_1B.yaml",
    "LENGTHS": "16",
    "OPTIONS": f"{TINY_BENCHMARK} {TINY_RECIPE}",
}

# A stand-in for sbatch. It runs the first task of a job array, but no other job: submitit's tasks
# wait for sbatch to return.
SBATCH = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
[[ -f $1 ]] || { echo "sbatch: error: no batch script $1" >&2; exit 1; }
size=$(sed -n 's/^#SBATCH --array=0-//p' "$1")
if [[ -n $size ]] && ! grep -q submitit "$1"; then
    SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=$((size + 1)) bash "$1" || exit
fi
echo "Submitted batch job 1"
"""

# A stand-in for torchrun that runs one process. tests/lingua/parallel/test_torchrun.py and others
# run the real one, which takes longer than a tiny run.
TORCHRUN = """#!/bin/bash
[[ $1 == --nproc-per-node && $2 -ge 1 && $3 == -m ]] || { echo "torchrun: $*" >&2; exit 2; }
shift 2
exec python "$@"
"""

# Files that a section's commands leave behind; * stands for any name.
LEAVES = {
    "Train": [
        "runs/train/metrics.jsonl",
        "runs/my_run/checkpoints",
        "runs/torchrun/checkpoints",
    ],
    "Generate, evaluate, benchmark": ["runs/quickstart/evals/0000000002*/results.json"],
    "docs/benchmarking.md: Prefill and decode": [
        "runs/looped.png",
        "runs/benchmark_prefill/benchmark_prefill.png",
        "runs/decode.md",
    ],
    "docs/benchmarking.md: Training steps": [
        "runs/benchmark_train/benchmark_train.png",
        "runs/speed.md",
    ],
    "docs/data.md: Prepare a corpus": [
        "data/fineweb_edu_shuffled/fineweb_edu.val.jsonl",
    ],
    "docs/data.md: Your own texts": ["runs/my_texts/metrics.jsonl"],
    "docs/data.md: Synthetic tasks": ["runs/pointers/evals/0000000002-n=16/validation.json"],
    "docs/data.md: Tokenize ahead of time": ["data/local/stdlib.chunk.00.tokens.json"],
    "docs/evaluation.md: start": ["runs/suites/results.json"],
    "docs/first_study.md: Table and figure": [
        "runs/first_study.png",
        "runs/first_study_flops.csv",
        "runs/first_study/report.html",
    ],
    "docs/huggingface.md: Export": ["runs/hf_model/modeling_lt2.py"],
    "docs/huggingface.md: Import": [
        "runs/continued/metrics.jsonl",
        "runs/looped_llama/params.json",
    ],
    "docs/loops.md: Leave the loops early": ["runs/exits.png", "runs/exits.jsonl"],
    "docs/slurm.md: Sweeps": ["runs/tune/lr=0.001,loop_count=1/submit.slurm"],
    "docs/training.md: start": ["runs/compared.png"],
    "setup/quickstart.sh": ["runs/loops_sweep.png", "runs/permutation/permutation.md"],
    "docs/training.md: Checkpoints": [
        "runs/weights/model.safetensors",
        "runs/hf/config.json",
        "runs/imported",
    ],
}
SECTIONS: dict[str, list[Command]] = {}
for command in commands():
    SECTIONS.setdefault(command.section, []).append(command)


def exception(command: Command) -> str | None:
    """The reason why this command is not run, if there is one."""
    form = command.module_form
    return next((why for start, why in EXCEPTIONS.items() if form.startswith(start)), None)


def as_run(command: Command) -> str:
    """The command with stand-ins for placeholders, and with smaller sizes."""
    text, form = (
        " ".join(re.sub(r"(^|\s)#.*", "", text).split())
        for text in (command.text, command.module_form)
    )
    starts = [start for start in SMALLER if form.startswith(start)]
    if starts and not text.endswith("--help"):
        text = f"{text} {SMALLER[max(starts, key=len)]}"
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    return text


class Shell:
    """A bash in a copy of this repository, with a fast `python` and stand-ins for SLURM."""

    def __init__(self, folder: Path, quick: QuickPython):
        self.folder = folder
        self.env = quick.env() | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        self.env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        self.env["HF_MODULES_CACHE"] = str(folder.parent / "hf_modules")
        self.bin = folder.parent / "bin"
        self.bin.mkdir()
        self.env["PATH"] = f"{self.bin}:{self.env['PATH']}"

    def add_program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        said = f"$ {text}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        assert done.returncode == 0, f"{said}\nexit status {done.returncode}"
        return done.stdout


@pytest.fixture(scope="module")
def shell(tmp_path_factory, quick_python):
    """A clone after a small setup/quickstart.sh: the corpus, and a run of two steps."""
    folder = tmp_path_factory.mktemp("clone") / "LT2"
    for name in ("apps", "lingua", "setup", "tokenizer"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / ".gitignore", folder)
    write_small_corpus(folder)
    return prepared(Shell(folder, quick_python.clone(folder)))


def prepared(shell: Shell) -> Shell:
    shell.run("git init -q && git add . && git -c user.name=a -c user.email=a commit -qm clone")
    sinfo = "#!/bin/bash\necho 60\n"  # minutes
    lt2 = '#!/bin/bash\nexec python -m apps.LT2 "$@"\n'
    programs = {"sbatch": SBATCH, "srun": "#!/bin/bash\n", "sinfo": sinfo, "lt2": lt2}
    programs["torchrun"] = TORCHRUN
    for name, text in programs.items():
        shell.add_program(name, text)
    train = "python -m apps.LT2.train config=apps/LT2/configs/600M/debug.yaml"
    shell.run(f"{train} {TINY_RUN} dump_dir=runs/quickstart")
    llama = "model.mixer=full model.attention_pattern=null model.loop_count=1 "
    llama += "model.gated_attn=false model.use_residual=false eval.validation=null"
    shell.run(f"{train} {TINY_RUN} {llama} dump_dir=runs/llama")
    return shell


def write_small_corpus(folder: Path) -> None:
    """Make data/local with setup/prepare_local_data.py from a few modules of Python's library."""
    file = folder / "setup/prepare_local_data.py"
    spec = importlib.util.spec_from_file_location("prepare_for_readme", file)
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    library = folder.parent / "library"
    library.mkdir()
    # The first validation text, keyword's, is one row. It is all that max_steps=1 reads.
    for name in ("argparse", "logging", "subprocess", "textwrap", "random", "typing", "keyword"):
        source = importlib.util.find_spec(name)
        assert source is not None and source.origin is not None
        shutil.copy(source.origin, library / f"{name}.py")
    prepare.main(["--out", str(folder / "data/local"), "--vocab-size", "300"], stdlib=library)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_commands_run(section, request):
    commands_to_run = [command for command in SECTIONS[section] if exception(command) is None]
    if not commands_to_run:
        pytest.skip("; ".join(sorted({str(exception(c)) for c in SECTIONS[section]})))
    if "lt2_local" in "".join(command.text for command in commands_to_run):
        pytest.importorskip("lm_eval")
    shell = request.getfixturevalue("shell")
    for command in commands_to_run:
        said = shell.run(as_run(command))
        if command.module_form.startswith("python -m apps.LT2.benchmark_prefill"):
            rows = json.loads(said.splitlines()[-1])["rows"]
            assert rows and all(row["decode"]["ms"] > 0 for row in rows)
    for program in programs(section):
        (shell.folder / "program.py").write_text(program)
        shell.run("python program.py")
        (shell.folder / "program.py").unlink()
    for file in LEAVES.get(section, []):
        assert list(shell.folder.glob(file)), f"{file} is missing after section {section}"
    # Git ignores what they leave, so no later run counts as one of changed code.
    assert shell.run("git status --porcelain") == ""


@pytest.mark.parametrize("start", [*EXCEPTIONS, *SMALLER, *PLACEHOLDERS])
def test_each_exception_is_of_some_command(start):
    assert any(start in command.module_form for command in commands())
