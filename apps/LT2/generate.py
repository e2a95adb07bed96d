"""Generate text from a checkpoint.

    python -m apps.LT2.generate ckpt=runs/demo max_gen_len=256 temperature=0.7 \\
        prompts='["Once upon a time"]'

Without `prompts` and `prompts_file`, prompts are the lines of stdin; on a terminal the program asks
for them, and for commands such as `/set temperature 0.5`; `/help` lists these. A single answer is
printed as it is generated.
"""

from __future__ import annotations

import codecs
import itertools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
    Prompt,
)
from apps.LT2.inference.load import (
    LoadedModel,
    load_model_and_tokenizer,
    resolve_device,
)
from apps.LT2.inference.prompts import pack_prompts as pack_prompts
from apps.LT2.inference.sampling import sample_tokens as sample_tokens
from apps.LT2.inference.session import Session, show
from apps.LT2.transformer import LoopedTransformer, LoopedTransformerArgs
from lingua.args import parse_args
from lingua.checkpoint import find_checkpoint
from lingua.errors import UserError, run_cli
from lingua.tokenizer import Tokenizer, well_formed


def load_consolidated_model_and_tokenizer(
    consolidated_path: str,
    model_cls: type = LoopedTransformer,
    model_args_cls: type = LoopedTransformerArgs,
) -> LoadedModel:
    """Do the same as `load_model_and_tokenizer`, under Lingua's name."""
    assert model_cls is LoopedTransformer, "only LoopedTransformer can be loaded"
    assert model_args_cls is LoopedTransformerArgs, "LoopedTransformer needs its own args"
    return load_model_and_tokenizer(str(consolidated_path))


@dataclass(kw_only=True)
class GenerateArgs(PackedCausalTransformerGeneratorArgs):
    POSITIONAL: ClassVar = "ckpt"
    ALIASES: ClassVar = {"ckpt_dir": "ckpt", "dump_dir": "ckpt"}

    ckpt: str  # a run's dump_dir (newest checkpoint), a step folder, or a weight file
    prompts: list[str] | None = None  # texts to continue, such as '["Once upon", "In a"]'
    prompts_file: str | None = None  # UTF-8 file; each line is a prompt, also an empty one
    skip_bad_prompts: bool = False  # report prompts that can't run, and run the others
    num_samples: int = 1  # answers per prompt; more than one needs a temperature
    loop_count: int | None = None  # number of loops; null = as in training
    weights: str = "auto"  # auto | int8: 8-bit weights for decode steps, on a GPU
    tokenizer_path: str | None = None  # path of the tokenizer file; null = as in training

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.prompts_file is not None:
            raise UserError(f"prompts_file={self.prompts_file}: prompts is also set; remove one")
        if self.num_samples < 1:
            raise UserError(f"num_samples={self.num_samples} must be at least 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"num_samples={self.num_samples}: all samples are equal at temperature=0; set a "
                "temperature such as 0.7"
            )


LOAD_OPTIONS = (
    "loop_count",
    "dtype",
    "device",
    "weights",
)  # a change in a session reloads the model
FIXED_OPTIONS = ("ckpt", "tokenizer_path", "prompts", "prompts_file", "skip_bad_prompts")


# ---- prompts


@dataclass
class PromptLine:
    source: str  # for messages, such as "stdin, line 3"
    text: str
    problem: str = ""  # why it can't run
    tokens: list[int] = field(default_factory=list)


def read_prompts(args: GenerateArgs) -> list[PromptLine] | None:
    """Return the prompts of the options or of stdin; None if stdin is a terminal."""
    if args.prompts is not None:
        source = "prompts=[]"
        prompts = [PromptLine(f"prompts[{i}]", text) for i, text in enumerate(args.prompts)]
    elif args.prompts_file is not None:
        source = f"prompts_file={args.prompts_file}"
        try:
            prompts = decode_lines(source, Path(args.prompts_file).read_bytes())
        except OSError as error:
            raise UserError(f"{source} is not readable: {error}") from None
    elif sys.stdin.isatty():
        return None
    else:
        source = "stdin"
        prompts = decode_lines(source, sys.stdin.buffer.read())
    if not prompts:
        raise UserError(f"{source} holds no prompt; use prompts='[\"...\"]', a file, or stdin")
    return prompts


def decode_lines(source: str, content: bytes) -> list[PromptLine]:
    """Decode UTF-8 lines; a line that isn't UTF-8 becomes a prompt with a problem."""
    prompts = []
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
    for i, line in enumerate(lines, start=1):
        text = problem = ""
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: {error.reason} at byte {error.start + 1}"
        prompts.append(PromptLine(f"{source}, line {i}", text, problem))
    return prompts


def reject_bad_prompts(prompts: list[PromptLine], *, skip: bool) -> None:
    """Raise UserError for prompts with a problem, or report them if `skip` and others can run."""
    bad = [prompt for prompt in prompts if prompt.problem]
    if skip and len(bad) < len(prompts):
        for prompt in bad:
            print(f"skipped: {prompt.source}: {prompt.problem}", file=sys.stderr)
    elif bad:
        others = f" ({len(bad) - 1} more can't run either)" if len(bad) > 1 else ""
        hint = "; skip_bad_prompts=true runs the others" if len(bad) < len(prompts) else ""
        raise UserError(f"{bad[0].source}: {bad[0].problem}{others}{hint}")


def tokenize_prompts(
    generator: PackedCausalTransformerGenerator, prompts: list[PromptLine]
) -> None:
    """Set the tokens or the problem of each prompt, in place."""
    prepared = generator.prepare([prompt.text for prompt in prompts])
    for prompt, tokens in zip(prompts, prepared, strict=True):
        if not isinstance(tokens, UserError):
            prompt.tokens = tokens
        elif not prompt.problem:
            prompt.problem = str(tokens)


# ---- answers


def shown_prompt(prompt: PromptLine, tokenizer: Tokenizer) -> str:
    """Return the text that the answer continues: the decoded tokens, or the uncut prompt."""
    text, decoded = well_formed(prompt.text), tokenizer.decode(prompt.tokens)
    return text if text.endswith(decoded.lstrip()) else decoded


def stream_answer(
    generator: PackedCausalTransformerGenerator, prompt: Prompt, *, place: int = 0
) -> None:
    """Print one answer as it is generated."""

    def stream(_: int, text: str) -> None:
        print(text, end="", flush=True)

    for _ in generator.complete([prompt], places=[place], on_text=stream, score=False):
        print()


def print_answers(
    generator: PackedCausalTransformerGenerator, prompts: list[PromptLine], *, num_samples: int
) -> None:
    """Print each prompt that can run with its answers, in order, as they are done."""
    good = {place: prompt for place, prompt in enumerate(prompts) if not prompt.problem}
    answers = generator.complete(
        [prompt.tokens for prompt in good.values()],
        num_samples=num_samples,
        places=list(good),
        score=False,
    )
    for place, prompt in good.items():
        label = f"[{place + 1}/{len(prompts)}]"
        print(f"{label} prompt: {well_formed(prompt.text)}", flush=True)
        for k, done in enumerate(itertools.islice(answers, num_samples), start=1):
            which = f"answer {k}" if num_samples > 1 else "answer"
            print(f"{label} {which}: {done.text}", flush=True)
        print()


def show_loops(generator: PackedCausalTransformerGenerator) -> None:
    """Print on stderr how many loops the tokens ran, if a rule decided it."""
    if (loops := generator.mean_loops) is not None:
        show(f"exit={generator.cfg.exit}: {loops:.2f} of {generator.model.n_loops} loops per token")


def load_generator(args: GenerateArgs) -> PackedCausalTransformerGenerator:
    model, tokenizer, config = load_model_and_tokenizer(
        args.ckpt,
        dtype=args.dtype,
        device=args.device,
        loop_count=args.loop_count,
        tokenizer_path=args.tokenizer_path,
        weights=args.weights,
        exit=args.exit,
    )
    add_bos = config["data"].get("add_bos", True)
    return PackedCausalTransformerGenerator(args, model, tokenizer, add_bos=add_bos)


def converse(args: GenerateArgs) -> None:
    """Answer prompts from the terminal; the n-th gets the same answers as in a list."""
    session = Session(args, load_generator, load_options=LOAD_OPTIONS, fixed_options=FIXED_OPTIONS)
    print("One prompt per line. /help lists commands, Ctrl-D ends.", file=sys.stderr)
    for place, prompt in session.prompts():
        generator, num_samples = session.generator, session.args.num_samples
        try:
            if num_samples == 1:
                stream_answer(generator, prompt, place=place)
                show_loops(generator)
                continue
            answers = generator.complete(
                [prompt], num_samples=num_samples, places=[place], score=False
            )
            for k, done in enumerate(answers, start=1):
                print(f"[{k}/{num_samples}] {done.text}\n", flush=True)
            show_loops(generator)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def main(argv: list[str]) -> None:
    args = parse_args(GenerateArgs, argv, prog="python -m apps.LT2.generate", doc=__doc__)
    args.uses_graph(resolve_device(args.device))
    # Now, to report a wrong path before asking for prompts, and only once: the run may save a newer
    # checkpoint, which a reload must not use.
    args = replace(args, ckpt=str(find_checkpoint(args.ckpt)))
    prompts = read_prompts(args)
    if prompts is None:
        converse(args)
        return
    generator = load_generator(args)
    tokenize_prompts(generator, prompts)
    reject_bad_prompts(prompts, skip=args.skip_bad_prompts)
    if len(prompts) == args.num_samples == 1:
        print(shown_prompt(prompts[0], generator.tokenizer), end="", flush=True)
        stream_answer(generator, prompts[0].tokens)
    else:
        print_answers(generator, prompts, num_samples=args.num_samples)
    show_loops(generator)


if __name__ == "__main__":
    run_cli(main)
