"""Name groups of a sweep's runs by the options that they have in common."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping

from lingua.config.help import format_value
from lingua.slurm.run_list import Options


def group_by_text(texts: Mapping[str, Iterable[str]], runs: Mapping[str, Options]) -> list[str]:
    """Return a line "group of runs: text" for each text, given the texts by label."""
    labels: dict[str, list[str]] = {}
    for label, text in itertools.chain.from_iterable(
        ((label, text) for text in of_run) for label, of_run in texts.items()
    ):
        labels.setdefault(text, []).append(label)
    return [f"{name_group(members, runs)}: {text}" for text, members in labels.items()]


def name_group(members: Collection[str], runs: Mapping[str, Options]) -> str:
    """Name some of the runs, if possible by values of options: "mixer=kda, T=1 or 2 (4 runs)"."""
    n = len(members)
    if n == 1:
        return next(iter(members))
    if n == len(runs):
        return f"all {n} runs" if n > 2 else "both runs"
    names, selected = [], set(runs)
    for option in dict.fromkeys(option for options in runs.values() for option in options):
        values = {label: format_value(o[option]) for label, o in runs.items() if option in o}
        chosen = list(dict.fromkeys(values[label] for label in members if label in values))
        narrower = {label for label in selected if values.get(label) in chosen}
        if all(label in values for label in members) and narrower < selected:
            names.append(f"{option.rpartition('.')[2]}={' or '.join(chosen)}")
            selected = narrower
    if selected == set(members):
        return f"{', '.join(names)} ({n} runs)"
    return f"{n} of {len(runs)} runs, such as {next(iter(members))}"
