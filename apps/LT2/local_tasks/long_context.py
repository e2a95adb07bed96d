"""Build recall tasks of 1k to 32k tokens, offline.

    lt2_needle     one number hidden in a text; as niah_single of RULER (arXiv 2404.06654)
    lt2_multikey   several numbers under different keys; as niah_multikey_1 of RULER
    lt2_mqar       a prompt full of pairs and questions for some; as MQAR (arXiv 2312.04927)

Lengths count the tokens of prompt and answer in the model's own tokenizer. Options are keys of
`harness.metadata`, or of `--metadata` of the harness's command line:

    lengths    some of LENGTHS; default: those from 1024 to 32768 that fit the model's window
    n_items    questions of each length; default: 100
    keys       numbers in the text of lt2_multikey; default: 4
    haystack   prose (the topics of Python's help) or noise (RULER's five sentences); default: prose

The same tokenizer, options and Python version give the same questions.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from lingua.errors import UserError
from lingua.prepare.prose import passages
from lingua.tokenizer import Tokenizer, build_tokenizer

LENGTHS = tuple(2**k for k in range(8, 17))
DEFAULT_LENGTHS = tuple(n for n in LENGTHS if 1024 <= n <= 32768)
ANSWER_TOKENS = 16  # max_gen_toks of needle.yaml
QUERIES = 4  # of each list of pairs
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
BEFORE = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {} is: {}."
QUESTION = (
    "\nWhat are all the special magic numbers for {0} mentioned in the provided text? The special "
    "magic numbers for {0} mentioned in the provided text are"
)
PAIRS = "Each word has a number.\n\n{}\n\nHere are some of the words again, with their numbers.\n\n"

Item = dict[str, Any]


class Request(NamedTuple):
    """The options of a task. (A dataclass cannot be in a file that the harness loads.)"""

    tokenizer: Tokenizer
    lengths: Sequence[int]
    n_items: int
    keys: int
    haystack: str

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_bos=True, add_eos=False))

    def cost(self, text: str) -> int:
        return self.count(text) - self.count("")

    def largest(self, build: Callable[[int], str], costs: Sequence[int], room: int) -> int:
        """Return the largest n for which `build(n)` has at most `room` tokens, -1 if none has.

        `costs`: about the tokens of each of the n parts.
        """
        n = bisect_right(list(accumulate(costs)), room - self.count(build(0)))
        while n >= 0 and self.count(build(n)) > room:
            n -= 1
        return n


def needle(**metadata: Any) -> Any:
    return as_dataset(needle_items(read_request(metadata), 1, "lt2_needle"))


def multikey(**metadata: Any) -> Any:
    request = read_request(metadata)
    return as_dataset(needle_items(request, request.keys, "lt2_multikey"))


def mqar(**metadata: Any) -> Any:
    return as_dataset(mqar_items(read_request(metadata)))


def as_dataset(items: list[Item]) -> Any:
    import datasets  # comes with lm_eval

    return {"test": datasets.Dataset.from_list(items)}


def read_request(metadata: dict[str, Any]) -> Request:
    """Read the options, and the tokenizer and window of the model.

    `eval` and training pass these as `lt2_tokenizer` and `lt2_window`. The harness's command line
    passes its `--model_args`, which name the checkpoint.
    """
    if "lt2_tokenizer" in metadata:
        tokenizer, window = build_tokenizer(*metadata["lt2_tokenizer"]), metadata["lt2_window"]
    else:
        tokenizer, window = read_checkpoint(metadata)
    fit = [n for n in DEFAULT_LENGTHS if n <= window]
    lengths = metadata.get("lengths", fit)
    shown = f"metadata.lengths={lengths}"
    if not lengths:
        raise UserError(
            f"the model's window of {window} tokens is below {DEFAULT_LENGTHS[0]}: set "
            "generator.max_prompt_len, or shorter metadata.lengths"
        )
    if not isinstance(lengths, list) or not set(lengths) <= set(LENGTHS):
        raise UserError(f"{shown} must be a list of {', '.join(map(str, LENGTHS))}")
    if max(lengths) > window:
        raise UserError(
            f"{shown}: {max(lengths)} is more than the model's window of {window} tokens, so the "
            "start of the prompt would be lost; set max_prompt_len, or shorter lengths"
        )
    numbers = {"n_items": metadata.get("n_items", 100), "keys": metadata.get("keys", 4)}
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"metadata.{name}={value} must be a whole number of 1 or more")
    haystack = metadata.get("haystack", "prose")
    if haystack not in ("prose", "noise"):
        raise UserError(f"metadata.haystack={haystack} must be prose or noise")
    return Request(tokenizer, lengths, haystack=haystack, **numbers)


def read_checkpoint(model_args: dict[str, Any]) -> tuple[Tokenizer, int]:
    """Return the tokenizer of a checkpoint, and the tokens of its longest prompt."""
    from apps.LT2.inference.load import (
        find_checkpoint,
        read_config,
        resolve_tokenizer,
        training_window,
    )

    if "ckpt" not in model_args:
        raise UserError("these tasks count tokens of an LT2 model: use --model lt2")
    source = find_checkpoint(model_args["ckpt"])
    config = read_config(source)
    args = resolve_tokenizer(source, config, model_args.get("tokenizer_path"))
    window = model_args.get("max_prompt_len") or training_window(config)
    return build_tokenizer(args.name, args.path), window


# ---- needles


def read_haystack(kind: str) -> list[str]:
    """Return sentences of English."""
    if kind == "noise":
        return re.split(r"(?<=\.) ", NOISE)
    from pydoc_data.topics import topics

    prose = [passage for _, text in sorted(topics.items()) for passage in passages(text)]
    return [s for passage in prose for s in re.split(r"(?<=[.!?]) +(?=[A-Z])", passage)]


def needle_items(request: Request, n_needles: int, task: str) -> list[Item]:
    """Hide `n_needles` numbers at random places between sentences. The question asks for one."""
    sentences = read_haystack(request.haystack)
    costs = [request.cost(f" {sentence}") for sentence in sentences]
    items = []
    for length in request.lengths:
        for number in range(request.n_items):
            rng = random.Random(f"{task}/{length}/{number}")
            keys = made_up_words(rng, n_needles)
            values = [str(rng.randrange(10**6, 10**7)) for _ in keys]
            depths = [rng.random() for _ in keys]
            start = rng.randrange(len(sentences))
            n_cycles = length // sum(costs) + 2
            hay = (sentences[start:] + sentences * n_cycles)[:length]
            hay_costs = (costs[start:] + costs * n_cycles)[:length]
            needles = list(zip(depths, keys, values, strict=True))
            build = partial(needle_prompt, hay, needles)
            n = request.largest(build, hay_costs, length - ANSWER_TOKENS)
            if n < 0:
                raise UserError(
                    f"metadata.lengths={list(request.lengths)}: {n_needles} needle"
                    f"{'s' * (n_needles > 1)}, the question and the answer of {task} take "
                    f"{request.count(build(0)) + ANSWER_TOKENS} tokens, more than {length}"
                )
            items.append({"prompt": build(n), "value": values[0], "length": length})
    return items


def needle_prompt(hay: Sequence[str], needles: Sequence[tuple[float, str, str]], n: int) -> str:
    """Put needles of (depth from 0 to 1, key, value) into n sentences, and ask for the first."""
    text = list(hay[:n])
    for depth, key, value in sorted(needles, reverse=True):
        text.insert(round(depth * n), NEEDLE.format(key, value))
    return BEFORE + " ".join(text) + QUESTION.format(needles[0][1])


def score_needle(doc: Item, results: list[str]) -> dict[str, float]:
    return by_length(doc, doc["value"] in results[0])


# ---- pairs


def mqar_items(request: Request) -> list[Item]:
    """Fill each prompt with pairs. QUERIES of them are asked, after the answers before."""
    items = []
    for length in request.lengths:
        for number in range(0, request.n_items, QUERIES):
            rng = random.Random(f"lt2_mqar/{length}/{number}")
            keys = made_up_words(rng, length // 4)  # a pair has more than 4 tokens
            lines = [f"{key}: {rng.randrange(100, 1000)}" for key in keys]
            costs = [request.cost(f"\n{line}") for line in lines]
            picks = [rng.random() for _ in range(QUERIES)]

            build = partial(pairs_prompt, lines, picks)
            n = request.largest(build, costs, length)
            if n < QUERIES:
                raise UserError(
                    f"metadata.lengths={list(request.lengths)}: {QUERIES} pairs and questions of "
                    f"lt2_mqar take {request.count(build(QUERIES))} tokens, more than {length}"
                )
            text = PAIRS.format("\n".join(lines[:n]))
            for line in ask(lines[:n], picks[: request.n_items - number]):
                key, value = line.split(": ")
                items.append({"prompt": f"{text}{key}:", "value": value, "length": length})
                text += f"{line}\n"
    return items


def pairs_prompt(lines: Sequence[str], picks: Sequence[float], n: int) -> str:
    return PAIRS.format("\n".join(lines[:n])) + "\n".join(ask(lines[:n], picks))


def ask(lines: Sequence[str], picks: Sequence[float]) -> list[str]:
    """Return different lines, at these shares of the list."""
    left = list(lines)
    return [left.pop(int(pick * len(left))) for pick in picks if left]


def score_mqar(doc: Item, results: list[tuple[float, bool]]) -> dict[str, float]:
    return by_length(doc, results[0][1])


# ---- both


def by_length(doc: Item, is_right: bool) -> dict[str, float]:
    return {"acc": float(is_right), f"acc_{doc['length']}": float(is_right)}


def made_up_words(rng: random.Random, n: int) -> list[str]:
    """Return n different words that no model has learned."""
    k = len(SYLLABLES)
    numbers = rng.sample(range(k**3), n)
    return ["".join(SYLLABLES[i // k**power % k] for power in range(3)) for i in numbers]
