"""Run the LM-Evaluation-Harness's own command line with the model `lt2`.

    python -m apps.LT2.lm_eval run --model lt2 --model_args ckpt=runs/demo --tasks arc_easy

The harness only finds registered models, so this module registers ours first. ModelArgs in
evaluation/harness.py lists the options of `--model_args`. Under torchrun the ranks share the
requests.
"""

from __future__ import annotations

import logging

from apps.LT2.evaluation.tasks import import_lm_eval
from lingua.errors import UserError, run_cli
from lingua.parallel.ranks import get_is_master

# First words of the harness's complaints about its command line.
MISTAKES = ("Tasks not found", "Attempted to load model", "Indices for islice", "Sample larger")
ADVICE = (
    "list the names with python -m apps.LT2.lm_eval ls tasks; the model is lt2; --limit and "
    "--num_fewshot must fit the task; without a network, set HF_HOME to a cache of the data, or "
    "use local tasks with --include_path"
)


def main(argv: list[str]) -> None:
    """Run the harness on `sys.argv`, which it reads itself."""
    command_line = import_lm_eval("lm_eval.__main__", needed_by="apps.LT2.lm_eval")
    import apps.LT2.evaluation.harness as _registers_lt2  # noqa: F401

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
