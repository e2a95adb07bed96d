"""lt2: the commands of this project. Each runs the same code as its `python -m MODULE`.

lt2 train config=apps/LT2/configs/600M/debug.yaml
lt2 train --help
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from lingua.config.stand_in import HELP, replace_torch_for_help
from lingua.errors import UserError, run_cli

# command -> its module, and what it does
COMMANDS = {
    "prepare": ("apps.LT2.scripts.prepare", "shuffle and split your own texts for training"),
    "describe": ("apps.LT2.describe", "layout, parameters, FLOPs and memory of configs"),
    "train": ("apps.LT2.train", "train in one process (torchrun starts several)"),
    "submit": ("lingua.stool", "submit runs and sweeps to SLURM, or start them here"),
    "sweep": ("lingua.sweep", "table of the runs of a sweep"),
    "study": ("apps.LT2.scripts.study", "run a study: arms, seeds, and a report"),
    "curriculum": (
        "apps.LT2.scripts.curriculum",
        "train arms on longer and longer synthetic examples",
    ),
    "plot": ("apps.LT2.scripts.plot", "plot any metric of runs"),
    "lens": ("apps.LT2.scripts.loop_lens", "predictions after each loop"),
    "exits": ("apps.LT2.scripts.exit_sweep", "loss and speed against the threshold of an exit"),
    "report": ("apps.LT2.scripts.report", "write an HTML page about a run or a folder of runs"),
    "generate": ("apps.LT2.generate", "generate text from a checkpoint"),
    "eval": ("apps.LT2.eval", "evaluate a checkpoint on tasks and held-out text"),
    "export": ("apps.LT2.scripts.export_weights", "write weights for torch, safetensors or HF"),
    "import": ("apps.LT2.scripts.import_hf", "read a Hugging Face folder"),
    "push": ("apps.LT2.scripts.push_to_hub", "upload an exported folder to the Hugging Face Hub"),
    "benchmark prefill": ("apps.LT2.benchmark_prefill", "speed of prefill and decode"),
    "benchmark report": (
        "apps.LT2.scripts.benchmark_report",
        "tables and figure of results of prefill or train",
    ),
    "benchmark train": ("apps.LT2.scripts.benchmark_train", "speed and memory of training"),
    "benchmark loader": ("apps.LT2.scripts.benchmark_loader", "speed of the data loader"),
    "benchmark checkpoint": (
        "apps.LT2.scripts.benchmark_checkpoint",
        "speed of saving and loading",
    ),
}


def main() -> None:
    """Run the command that sys.argv names, or list the commands. The console script `lt2`."""
    argv = sys.argv[1:]
    names = [" ".join(argv[:n]) for n in (1, 2)]
    name = next((name for name in names if name in COMMANDS), None)
    if name is None:
        sys.argv[0] = "lt2"
        run_cli(list_commands)
        return
    rest = argv[len(name.split()) :]
    sys.argv = [f"lt2 {name}", *rest]  # the program's name in messages
    replace_torch_for_help(rest)
    module = COMMANDS[name][0]
    run_cli(lambda argv: importlib.import_module(module).main(argv))  # importing torch takes long


def list_commands(argv: Sequence[str]) -> None:
    """Print all commands, or one group such as `benchmark`. UserError for an unknown name."""
    given = [arg for arg in argv if arg not in HELP]
    shown = [name for name in COMMANDS if name.split()[: len(given)] == given]
    if not shown:
        name = " ".join(given[:2] if given[0] == "benchmark" else given[:1])
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean lt2 {close[0]}?" if close else "lt2 --help lists all"
        raise UserError(f"lt2 {name}: no such command; {advice}")
    print(f"usage: lt2 {' '.join([*given, 'COMMAND'])} [options]\n")
    for name in shown:
        print(f"  {name:18} {COMMANDS[name][1]}")
    print("\nlt2 COMMAND --help shows the options of a command.")


if __name__ == "__main__":
    main()
