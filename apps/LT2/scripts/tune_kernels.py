"""Write the short list of kernel configurations for a GPU from the results of a full search.

    export TRITON_CACHE_DIR=/tmp/tuned LT2_TUNE=full
    python -m apps.LT2.scripts.benchmark_train RECIPE.yaml ... --steps 3 --warmup 1
    python -m apps.LT2.scripts.tune_kernels $TRITON_CACHE_DIR

Triton's cache holds the time of every configuration of a kernel, for each shape that ran. The list
(apps.LT2.kernel.tuning) gets the fewest configurations that are within 3% of the best for every
shape. It keeps what it had for other shapes; delete the file to start again.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from apps.LT2.kernel.tuning import FOLDER, Entry, file_of_gpu
from lingua.config.cli import OneLineParser
from lingua.errors import UserError, run_cli
from lingua.files.atomic import write_atomic

SUFFIX = ".autotune.json"
TOLERANCE = 1.03  # of the best time, for every shape
CLOSE = 1.1  # of the best time, on average: may be the best for other shapes
N_BEST, N_ALL = 2, 4  # a list is filled up to N_BEST with close ones, and to N_ALL with others
WORST = 100.0  # ratio of a configuration that does not fit

Times = dict[str, float]  # configuration, as JSON -> ratio to the best time


def read_times(folders: Iterable[Path]) -> dict[str, list[Times]]:
    """Return the measured times of each kernel, one entry per shape: the longest search of each."""
    found: dict[tuple[str, str], Times] = {}
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                if not name.endswith(SUFFIX):
                    continue
                search = json.loads(Path(root, name).read_text(encoding="utf-8"))
                key = name.removesuffix(SUFFIX), json.dumps(search["key"])
                times = {_entry(config): t[0] for config, t in search["configs_timings"]}
                if len(times) > len(found.get(key, {})) and math.isfinite(min(times.values())):
                    found[key] = times
    kernels = defaultdict(list)
    for (kernel, _), times in sorted(found.items()):
        best = min(times.values())
        kernels[kernel].append({c: min(t / best, WORST) for c, t in times.items()})
    return dict(kernels)


def _entry(config: dict[str, Any]) -> str:
    """Return the arguments of a cached configuration, as `tuning.describe_config` does, as JSON."""
    options = {k: config[k] for k in ("num_warps", "num_ctas", "num_stages", "maxnreg")}
    options = {k: v for k, v in options.items() if v is not None and (k, v) != ("num_ctas", 1)}
    return json.dumps({**config["kwargs"], **options})


def choose(shapes: list[Times]) -> dict[str, list[Entry]]:
    """Choose configurations for a kernel from its times for each shape."""

    def mean(configs: list[str]) -> float:
        """Return the mean over shapes of the best ratio, a geometric mean."""
        logs = [math.log(min(times.get(c, WORST) for c in configs)) for times in shapes]
        return math.exp(sum(logs) / len(logs))

    left = list(dict.fromkeys(c for times in shapes for c, ratio in times.items() if ratio < WORST))
    best: list[str] = []

    def take(into: list[str], score: list[str]) -> None:
        into.append(min(left, key=lambda c: mean([*score, c])))
        left.remove(into[-1])

    while not best or any(min(t.get(c, WORST) for c in best) > TOLERANCE for t in shapes):
        take(best, best)
    while len(best) < N_BEST and left and min(mean([c]) for c in left) <= CLOSE:
        take(best, [])
    others: list[str] = []
    while left and len(best) + len(others) < N_ALL:
        take(others, [])
    return {"best": [json.loads(c) for c in best], "others": [json.loads(c) for c in others]}


def write_lists(path: Path, gpu: str, kernels: dict[str, dict[str, list[Entry]]]) -> None:
    """Write the file of a GPU, a line per kernel. Entries of an existing file stay, at the end."""
    old = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.exists() else {}
    kernels = old | {name: _join(new, old.get(name)) for name, new in kernels.items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels)]
    text = ",\n".join(lines)
    write_atomic(path, f'{{"gpu": {json.dumps(gpu)}, "kernels": {{\n{text}\n}}}}\n')


def _join(
    new: dict[str, list[Entry]], old: dict[str, list[Entry]] | None
) -> dict[str, list[Entry]]:
    if old is None:
        return new
    best = new["best"] + [e for e in old["best"] if e not in new["best"]]
    others = new["others"] + [e for e in old["others"] if e not in new["others"]]
    return {"best": best, "others": [e for e in others if e not in best]}


def main(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="python -m apps.LT2.scripts.tune_kernels",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("folders", nargs="+", type=Path, help="TRITON_CACHE_DIR of full searches")
    parser.add_argument("--gpu", help="name of the GPU that was measured; default: this GPU")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the lists")
    given = parser.parse_args(argv)
    if given.gpu is None and not torch.cuda.is_available():
        raise UserError("no GPU is visible here: name the one that was measured with --gpu")
    gpu = given.gpu or torch.cuda.get_device_name()
    for folder in given.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name the TRITON_CACHE_DIR of the search")
    times = read_times(given.folders)
    if not times:
        raise UserError(
            f"{', '.join(map(str, given.folders))}: no *{SUFFIX}; train first, with LT2_TUNE=full "
            "and this TRITON_CACHE_DIR"
        )
    kernels = {kernel: choose(shapes) for kernel, shapes in times.items()}
    for kernel, shapes in times.items():
        n_tried = max(map(len, shapes))
        print(f"{kernel}: {len(shapes)} shapes, {len(kernels[kernel]['best'])} of {n_tried}")
    path = file_of_gpu(gpu, given.out)
    write_lists(path, gpu, kernels)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_cli(main)
