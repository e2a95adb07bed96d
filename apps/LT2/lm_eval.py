"""The LM-Evaluation-Harness's own command line, with the model `lt2` in it.

    python -m apps.LT2.lm_eval run --model lt2 --model_args ckpt=runs/demo --tasks arc_easy

The harness finds no models outside of its package by itself: this registers ours, then hands over.
What `--model_args` knows is in harness.ModelArgs; under torchrun the ranks share the requests.
"""

from __future__ import annotations

import logging
import os

from lingua.errors import UserError, import_optional, run_cli
from lingua.parallel.ranks import get_is_master

# How the harness begins its complaints about what it was told on the command line.
MISTAKES = ("Tasks not found", "Attempted to load model", "Indices for islice", "Sample larger")
ADVICE = (
    "names: python -m apps.LT2.lm_eval ls tasks; the model is lt2; --limit and --num_fewshot fit "
    "the task; data that cannot be downloaded here may lie where HF_HOME says, or use local tasks "
    "by --include_path"
)


def main(argv: list[str]) -> None:
    """Run the harness on `sys.argv`, which it reads itself; `argv` is the same without its head."""
    command_line = import_optional("lm_eval.__main__", extra="eval", needed_by="apps.LT2.lm_eval")
    import apps.LT2.evaluation.harness as _registers_lt2  # noqa: F401

    # As in eval.py: lm_eval's pool of workers for standard errors may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    if not get_is_master():
        logging.disable(logging.INFO)  # every rank would print the same lines
    try:
        command_line.cli_evaluate()
    except UserError:
        raise
    except (ValueError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, ConnectionError) and not reason.startswith(MISTAKES):
            raise
        raise UserError(f"{reason}; {ADVICE}") from None


if __name__ == "__main__":
    run_cli(main)
