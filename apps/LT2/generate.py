"""Generate text from a checkpoint.

    python -m apps.LT2.generate ckpt=runs/demo max_gen_len=256 temperature=0.7 \\
        prompts='["Once upon a time"]'

Without `prompts` or `prompts_file` the lines of stdin are the prompts; on a terminal it asks for
them. A single answer is shown as it comes, those of a list in order. The library behind this is
generator.py.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator as PackedCausalTransformerGenerator,
)
from apps.LT2.inference.generator import (
    PackedCausalTransformerGeneratorArgs as PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.inference.generator import Prompt
from apps.LT2.inference.load import find_checkpoint, load_model_and_tokenizer, resolve_device
from lingua.args import parse_args
from lingua.errors import UserError, run_cli
from lingua.tokenizer import well_formed


@dataclass(kw_only=True)
class GenerateArgs(PackedCausalTransformerGeneratorArgs):
    ckpt: str  # a run's dump_dir (newest checkpoint), a step folder, or a file of weights
    prompts: list[str] | None = None  # texts to go on with, as '["Once upon", "In a"]'
    prompts_file: str | None = None  # UTF-8 file with a prompt on every line, empty ones too
    skip_bad_prompts: bool = False  # name the prompts that cannot run, and run the others
    num_samples: int = 1  # answers to each prompt; more than one needs a temperature
    loop_count: int | None = None  # run the stack this often; null = as in training
    tokenizer_path: str | None = None  # where the tokenizer's file lies now; null = as in training

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.prompts_file is not None:
            raise UserError(f"prompts_file={self.prompts_file}: prompts is set, too; leave one out")
        if self.num_samples < 1:
            raise UserError(f"num_samples={self.num_samples} must be at least 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"num_samples={self.num_samples}: with temperature=0 all of them are the same; "
                "set a temperature such as 0.7"
            )


# ---- prompts


@dataclass
class PromptLine:
    where: str  # it comes from, for messages
    text: str
    problem: str = ""  # why it cannot be answered


def read_prompts(args: GenerateArgs) -> list[PromptLine] | None:
    """The prompts from where the options say; None means to ask for them on the terminal."""
    if args.prompts is not None:
        where = "prompts=[]"
        prompts = [PromptLine(f"prompts[{i}]", text) for i, text in enumerate(args.prompts)]
    elif args.prompts_file is not None:
        where = f"prompts_file={args.prompts_file}"
        try:
            prompts = split_lines(where, Path(args.prompts_file).read_bytes())
        except OSError as error:
            raise UserError(f"{where}: not readable: {error}") from None
    elif sys.stdin.isatty():
        return None
    else:
        where = "stdin"
        prompts = split_lines(where, sys.stdin.buffer.read())
    if not prompts:
        raise UserError(
            f"{where} holds no prompt: give prompts='[\"...\"]', a file, or lines on stdin"
        )
    return prompts


def split_lines(where: str, content: bytes) -> list[PromptLine]:
    """Lines as files have them; str.splitlines would cut at rarer characters, too."""
    lines = content.replace(b"\r\n", b"\n").split(b"\n")
    if lines[-1] == b"":
        del lines[-1]
    return [decode_line(f"{where}, line {i}", line) for i, line in enumerate(lines, start=1)]


def decode_line(where: str, line: bytes) -> PromptLine:
    try:
        return PromptLine(where, line.decode("utf-8"))
    except UnicodeDecodeError as error:
        shown = line.decode("utf-8", errors="replace")
        return PromptLine(where, shown, f"not UTF-8: {error.reason} at byte {error.start + 1}")


def refuse_bad_prompts(prompts: list[PromptLine], *, skip: bool) -> None:
    """Name the prompts that cannot be answered; a UserError, unless others are to go on."""
    bad = [prompt for prompt in prompts if prompt.problem]
    if skip and len(bad) < len(prompts):
        for prompt in bad:
            print(f"skipped: {prompt.where}: {prompt.problem}", file=sys.stderr)
    elif bad:
        others = f" ({len(bad) - 1} more cannot run either)" if len(bad) > 1 else ""
        hint = "; or run the rest by skip_bad_prompts=true" if len(bad) < len(prompts) else ""
        raise UserError(f"{bad[0].where}: {bad[0].problem}{others}{hint}")


def prepare_prompts(
    generator: PackedCausalTransformerGenerator, prompts: list[PromptLine], *, skip: bool
) -> dict[int, list[int]]:
    """Token ids of the prompts that can be answered, by their place in the list."""
    tokens = generator.prepare([prompt.text for prompt in prompts])
    for prompt, prepared in zip(prompts, tokens, strict=True):
        if isinstance(prepared, UserError) and not prompt.problem:
            prompt.problem = str(prepared)
    refuse_bad_prompts(prompts, skip=skip)
    return {
        place: prepared
        for place, (prompt, prepared) in enumerate(zip(prompts, tokens, strict=True))
        if not prompt.problem and not isinstance(prepared, UserError)
    }


# ---- answers


def answer_one(
    generator: PackedCausalTransformerGenerator, prompt: Prompt, *, place: int = 0
) -> None:
    """Print an answer as it comes."""

    def show(_: int, text: str) -> None:
        print(text, end="", flush=True)

    for _ in generator.complete([prompt], places=[place], on_text=show, score=False):
        print()


def answer_often(
    generator: PackedCausalTransformerGenerator, prompt: Prompt, *, place: int, num_samples: int
) -> None:
    """Print several answers to a prompt, numbered, as they are done."""
    answers = generator.complete([prompt], num_samples=num_samples, places=[place], score=False)
    for k, done in enumerate(answers, start=1):
        print(f"[{k}/{num_samples}] {done.text}\n", flush=True)


def answer_all(
    generator: PackedCausalTransformerGenerator,
    prompts: list[PromptLine],
    tokens: dict[int, list[int]],
    *,
    num_samples: int,
) -> None:
    """Print each prompt with its answers, in order, as they are done. `tokens` has the token ids
    of those to answer, by place."""
    answers = generator.complete(
        list(tokens.values()), num_samples=num_samples, places=list(tokens), score=False
    )
    numbered = itertools.product(tokens, range(1, num_samples + 1))
    for (place, k), done in zip(numbered, answers, strict=True):
        label = f"{place + 1}/{len(prompts)}"
        if k == 1:
            print(f"[{label}] prompt: {well_formed(prompts[place].text)}")
        which = f"answer {k}" if num_samples > 1 else "answer"
        print(
            f"[{label}] {which}: {done.text}", end="\n" if k < num_samples else "\n\n", flush=True
        )


def converse(generator: PackedCausalTransformerGenerator, *, num_samples: int) -> None:
    """Ask for prompts on the terminal; the n-th gets the answers it would get in a list."""
    print("A prompt on each line. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    for index in itertools.count():
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if num_samples == 1:
                answer_one(generator, prompt, place=index)
            else:
                answer_often(generator, prompt, place=index, num_samples=num_samples)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def main(argv: list[str]) -> None:
    args = parse_args(
        GenerateArgs,
        argv,
        prog="python -m apps.LT2.generate",
        description="Generate text from a checkpoint.",
        examples=[
            "python -m apps.LT2.generate ckpt=runs/demo max_gen_len=256 temperature=0.7 "
            "prompts='[\"Once upon a time\"]'",
            "python -m apps.LT2.generate ckpt=runs/demo prompts_file=prompts.txt until='[\"\\n\"]'",
        ],
    )
    args.uses_graph(resolve_device(args.device))
    find_checkpoint(args.ckpt)  # before prompts are asked for
    prompts = read_prompts(args)
    if prompts is not None and not args.skip_bad_prompts:
        refuse_bad_prompts(prompts, skip=False)
    model, tokenizer, config = load_model_and_tokenizer(
        args.ckpt,
        dtype=args.dtype,
        device=args.device,
        loop_count=args.loop_count,
        tokenizer_path=args.tokenizer_path,
    )
    add_bos = config["data"].get("add_bos", True)
    generator = PackedCausalTransformerGenerator(args, model, tokenizer, add_bos=add_bos)
    if prompts is None:
        converse(generator, num_samples=args.num_samples)
        return
    tokens = prepare_prompts(generator, prompts, skip=args.skip_bad_prompts)
    if len(prompts) == args.num_samples == 1:
        print(well_formed(prompts[0].text), end="", flush=True)
        answer_one(generator, tokens[0])
    else:
        answer_all(generator, prompts, tokens, num_samples=args.num_samples)


if __name__ == "__main__":
    run_cli(main)
