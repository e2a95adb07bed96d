"""Generate text from a checkpoint.

    python -m apps.LT2.generate ckpt=runs/demo max_gen_len=256 temperature=0.7 \\
        prompts='["Once upon a time"]'

Without `prompts` or `prompts_file` the lines of stdin are the prompts; on a terminal it asks for
them. A single answer is shown as it comes. The library behind this is generator.py.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from apps.LT2.generator import PackedCausalTransformerGenerator as PackedCausalTransformerGenerator
from apps.LT2.generator import (
    PackedCausalTransformerGeneratorArgs as PackedCausalTransformerGeneratorArgs,
)
from apps.LT2.load import load_model_and_tokenizer
from lingua.args import UserError, parse_args, run_cli
from lingua.tokenizer import well_formed


@dataclass(kw_only=True)
class GenerateArgs(PackedCausalTransformerGeneratorArgs):
    ckpt: str  # a run's dump_dir (newest checkpoint), a step folder, or a file of weights
    prompts: list[str] | None = None  # texts to go on with, as '["Once upon", "In a"]'
    prompts_file: str | None = None  # UTF-8 file with a prompt on every line, empty ones too
    loop_count: int | None = None  # run the stack this often; null = as in training
    tokenizer_path: str | None = None  # where the tokenizer's file lies now; null = as in training

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.prompts_file is not None:
            raise UserError(f"prompts_file={self.prompts_file}: prompts is set, too; leave one out")


def read_prompts(args: GenerateArgs) -> list[str] | None:
    """The prompts from where the options say; None means to ask for them on the terminal."""
    if args.prompts is not None:
        prompts, where = args.prompts, "prompts=[]"
    elif args.prompts_file is not None:
        where = f"prompts_file={args.prompts_file}"
        try:
            prompts = split_lines(Path(args.prompts_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not readable: {error}") from None
    elif sys.stdin.isatty():
        return None
    else:
        where = "stdin"
        try:
            prompts = split_lines(sys.stdin.read())
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not UTF-8: {error}") from None
    if not prompts:
        raise UserError(
            f"{where} holds no prompt: give prompts='[\"...\"]', a file, or lines on stdin"
        )
    return prompts


def split_lines(text: str) -> list[str]:
    """Lines as files have them; str.splitlines would cut at rarer characters, too."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def answer_one(generator: PackedCausalTransformerGenerator, prompt: str, place: int = 0) -> None:
    """Print an answer as it comes."""

    def show(_: int, text: str) -> None:
        print(text, end="", flush=True)

    for _ in generator.complete([prompt], places=[place], on_text=show, score=False):
        print()


def answer_all(generator: PackedCausalTransformerGenerator, prompts: list[str]) -> None:
    """Print each prompt with its answer, as batches are done."""
    answers = generator.complete(prompts, score=False)
    for i, (prompt, done) in enumerate(zip(prompts, answers, strict=True)):
        place = f"{i + 1}/{len(prompts)}"
        print(
            f"[{place}] prompt: {well_formed(prompt)}\n[{place}] answer: {done.text}\n", flush=True
        )


def converse(generator: PackedCausalTransformerGenerator) -> None:
    """Ask for prompts on the terminal; the n-th gets the answer it would get in a list."""
    print("A prompt on each line. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    for index in itertools.count():
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            answer_one(generator, prompt, index)
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
    prompts = read_prompts(args)
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
        converse(generator)
    elif len(prompts) == 1:
        print(well_formed(prompts[0]), end="", flush=True)
        answer_one(generator, prompts[0])
    else:
        answer_all(generator, prompts)


if __name__ == "__main__":
    run_cli(main)
