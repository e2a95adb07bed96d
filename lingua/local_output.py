"""Where a run of this machine writes, and what it said last: its terminal shows none of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lingua.slurm.script import Job

MAX_READ = 2**16  # bytes at the end of a file
MAX_LENGTH = 300  # characters of a line that is shown
# torchrun ends with a report of its own, behind the error of the rank
ERROR = re.compile(r"(\[rank\d+\]: )?(error: \S|[\w.]*(Error|Exception|Fault)(: |$))")
# what other ranks say when one is gone
FOLLOWS = re.compile(r"Connection (closed|reset)|ncclRemoteError|remote process exited")
RULE = re.compile(r"[-=\s]*")


class LocalOutput:
    """logs/local/run.out and run.err, to which submit.slurm appends at each start."""

    def __init__(self, job: Job):
        logs = job.dump_dir / "logs" / "local"
        self.out, self.err = logs / "run.out", logs / "run.err"
        self._begin = size_of(self.err)

    def last_error(self) -> str | None:
        """What run.err says since this object was made, in a line; None if it says nothing."""
        end = size_of(self.err)
        if end <= self._begin:
            return None
        with open(self.err, "rb") as file:
            file.seek(max(self._begin, end - MAX_READ))
            lines = file.read().decode("utf-8", "replace").splitlines()
        said = [line.strip() for line in lines if not RULE.fullmatch(line)]
        errors = [line for line in said if ERROR.match(line)]
        causes = [line for line in errors if not FOLLOWS.search(line)]
        last = (causes or errors or said or [""])[-1]
        return last if len(last) <= MAX_LENGTH else f"{last[:MAX_LENGTH]} ..."


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def local_output(job: Job) -> LocalOutput | None:
    """None where its output goes elsewhere: to stool's, or to files of SLURM's ranks."""
    is_local = not job.args.stdout and not os.environ.get("SLURM_JOB_ID")
    return LocalOutput(job) if job.args.launcher == "bash" and is_local else None
