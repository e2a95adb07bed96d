"""A session in the terminal: prompts, and commands between them such as `/set temperature 0.5`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from apps.LT2.inference.generator import (
    PackedCausalTransformerGenerator,
    PackedCausalTransformerGeneratorArgs,
)
from lingua.args import dataclass_to_dict, parse_args
from lingua.config.help import describe_fields, field_types, format_value
from lingua.errors import UserError

HELP = '''\
A line is a prompt. The model doesn't see earlier prompts and answers.

"""text"""        a prompt that has several lines or starts with /
/set NAME VALUE   change an option, for example /set temperature 0.5
/set NAME         show an option
/set              list the options
/loops N          run the layers N times; /loops null: as in training
/reset            restore the options and random numbers of the start
/help             print this help
/quit             end, like Ctrl-D

Ctrl-C stops an answer. The arrow keys edit the line and recall earlier ones.'''
QUOTES = '"""'

A = TypeVar("A", bound=PackedCausalTransformerGeneratorArgs)


class Session(Generic[A]):
    """Reads prompts and runs commands. `args` and `generator` make the next answer."""

    def __init__(
        self,
        args: A,
        load: Callable[[A], PackedCausalTransformerGenerator],
        *,
        load_options: Sequence[str],
        fixed_options: Sequence[str],
    ):
        """load: load the model; called again if one of `load_options` changes.

        fixed_options: options that `/set` refuses.
        """
        self.args = self._first_args = args
        self.generator = load(args)
        self._load, self._load_options, self._fixed_options = load, load_options, fixed_options
        self._n_prompts = 0

    def prompts(self) -> Iterator[tuple[int, str]]:
        """Yield (number since the start or /reset, prompt) until /quit or the end of the input."""
        with suppress(ImportError):  # some builds of Python lack it
            import readline  # noqa: F401, gives input() editing and a history
        while True:
            try:
                line = input("> ")
                if line.startswith("/"):
                    if line.strip() == "/quit":
                        return
                    self._run(line)
                    continue
                prompt = read_block(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                show("\nCtrl-D or /quit ends")
                continue
            except UserError as error:
                show(f"error: {error}")
                continue
            self._n_prompts += 1
            yield self._n_prompts - 1, prompt

    def _run(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/help":
            show(HELP)
        elif command == "/set" and rest:
            name, value = re.split(r"[\s=]+", f"{rest} ", maxsplit=1)
            name = getattr(self.args, "ALIASES", {}).get(name, name)
            if value or name not in field_types(type(self.args)):
                self._set(name, value.strip())
            show(f"{name}: {format_value(getattr(self.args, name))}")
        elif command == "/set":
            self._list_options()
        elif command == "/loops":
            if rest:
                self._set("loop_count", rest)
            show(f"loops: {self.generator.model.n_loops}")
        elif command == "/reset":
            self._change(self._first_args)
            self._n_prompts = 0
        else:
            raise UserError(
                f"{command} is not a command; /help lists them. Put a prompt that starts with / "
                f"between {QUOTES}"
            )

    def _set(self, name: str, value: str) -> None:
        if name in self._fixed_options:
            raise UserError(f"{name} can only be set on the command line, as {name}={value}")
        config = dataclass_to_dict(self.args)
        self._change(parse_args(type(self.args), [f"{name}={value}"], config=config))

    def _change(self, args: A) -> None:
        """Use other options. After an error, those before stay in use."""
        old = self.generator
        if any(getattr(args, name) != getattr(self.args, name) for name in self._load_options):
            self.generator = self._load(args)
        else:
            self.generator = PackedCausalTransformerGenerator(
                args, old.model, old.tokenizer, add_bos=old.add_bos
            )
        self.args = args

    def _list_options(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, show_header=False)
        for doc in describe_fields(type(self.args)):
            if doc.path not in self._fixed_options:
                value = format_value(getattr(self.args, doc.path))
                table.add_row(doc.path, value, doc.meaning)
        Console(stderr=True, markup=False).print(table)


def read_block(line: str) -> str:
    """Return a line, or the text between triple quotes, which may continue on further lines."""
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    # quotes alone on a line don't add an empty line
    first, last = len(lines) > 1 and not lines[0], len(lines) > 1 and not lines[-1]
    return "\n".join(lines[first : len(lines) - last])


def show(text: str) -> None:
    """Print on stderr, so that stdout has only answers."""
    print(text, file=sys.stderr, flush=True)
