"""Run the LM-Evaluation-Harness's own command line with the model `lt2`.

    python -m apps.LT2.lm_eval run --model lt2 --model_args ckpt=runs/demo --tasks arc_easy

The harness only finds registered models, so this module registers ours first. ModelArgs in
evaluation/harness.py lists the options of `--model_args`. Under torchrun the ranks share the
requests.
"""

from __future__ import annotations

import logging
from typing import Any

from apps.LT2.evaluation.tasks import OFFLINE, import_lm_eval, is_connection_error
from lingua.errors import UserError, first_line, run_cli
from lingua.parallel.ranks import get_is_master

# First words of the harness's complaints about its command line.
MISTAKES = (
    "Attempted to load model",
    "Indices for islice",
    "No tasks specified",
    "Sample larger",
    "Tasks not found",
)
ADVICE = (
    "list the names with python -m apps.LT2.lm_eval ls tasks; the model is lt2; --limit and "
    "--num_fewshot must fit the task"
)


def main(argv: list[str]) -> None:
    """Run the harness on `sys.argv`, which it reads itself."""
    command_line = import_lm_eval("lm_eval.__main__", needed_by="apps.LT2.lm_eval")
    evaluator = import_lm_eval("lm_eval.evaluator", needed_by="apps.LT2.lm_eval")
    from apps.LT2.evaluation.harness import check_generation  # its import registers lt2

    inner = evaluator.evaluate

    def check_and_evaluate(lm: Any, task_dict: Any, **options: Any) -> Any:
        check_generation(lm, task_dict["tasks"])
        return inner(lm=lm, task_dict=task_dict, **options)

    if not get_is_master():
        logging.disable(logging.INFO)  # every rank would print the same lines
    try:
        evaluator.evaluate = check_and_evaluate
        command_line.cli_evaluate()
    except UserError:
        raise
    except Exception as error:
        is_offline = is_connection_error(error)
        reason = first_line(error).rstrip(".:")
        if not is_offline and not (isinstance(error, ValueError) and reason.startswith(MISTAKES)):
            raise
        raise UserError(f"{reason}; {OFFLINE if is_offline else ADVICE}") from None
    finally:
        evaluator.evaluate = inner


if __name__ == "__main__":
    run_cli(main)
