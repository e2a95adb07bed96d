"""Configuration: dataclasses filled from defaults, a YAML file and the command line, in that order.

    args = parse_args(TrainArgs, sys.argv[1:], prog="python -m apps.LT2.train")

reads `config=run.yaml optim.lr=1e-3 data.sources.wiki=0.5`. A mistake of the user is a UserError of
one line: an unknown option, a value of the wrong type, a file that is not YAML.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lingua.config.cli import split_paths
from lingua.config.from_dict import Options, Text
from lingua.config.help import as_started, field_types, format_help, format_value
from lingua.config.ignored import why_ignored
from lingua.config.stand_in import HELP
from lingua.config.yaml import read_yaml_file
from lingua.errors import UserError, import_optional
from lingua.files.atomic import write_atomic
from lingua.redact import redact_all

logger = logging.getLogger(__name__)
T = TypeVar("T")


def parse_args(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str = "python -m ...",
    doc: str | None = "",
    config: Mapping[str, Any] | None = None,
) -> T:
    """Read `[config=FILE.yaml] [a.b=c ...]` into a `cls`; `--help` prints every option and exits.

    The help starts with the first two paragraphs of `doc`, the command's docstring: what it does,
    and examples. `--help model.gdn` prints one section. If `cls` has a field `config`, `config=`
    sets that field and no file is read. The argument `config` is a mapping that replaces the file.
    A class attribute POSITIONAL names the option of a path without a name, and ALIASES maps other
    names of options to their own. OTHER_OPTIONS is advice for options that the class lacks.
    NAMED_BY of a section is the option that text in place of the section sets.
    """
    if not HELP.isdisjoint(argv):
        last = max(i for i, arg in enumerate(argv) if arg in HELP)
        sections = [arg for arg in argv[last + 1 :] if "=" not in arg]
        text = format_help(cls, prog=prog, docstring=doc or "", sections=sections)
        print_text(as_started(text, prog))
        raise SystemExit(0)
    if option := getattr(cls, "POSITIONAL", None):
        paths, argv = split_paths(argv)
        if len(paths) > 1:
            raise UserError(f"{paths[1]}: write option=value ({option} is {paths[0]})")
        argv += [f"{option}={path}" for path in paths]
    typed = [_split_option(arg) for arg in argv]
    options = Options(cls)
    if config is not None:
        options.add(config)
    elif "config" not in field_types(cls):
        files = [value for name, value in typed if name == "config"]
        typed = [(name, value) for name, value in typed if name != "config"]
        if len(files) > 1:
            raise UserError(f"config= is given {len(files)} times ({', '.join(files)}); keep one")
        if files:
            options.add(*read_yaml_file(files[0]))
    for name, value in typed:
        options.add({re.sub(r"\[([^\]]*)\]", r".\1", name): Text(value)})  # a[b] is a.b
    return options.build()


def dataclass_from_dict(cls: type[T], data: Mapping[str, Any], strict: bool = True) -> T:
    """Build `cls` with its nested sections; `strict=False` ignores unknown keys."""
    options = Options(cls, strict)
    options.add(data)
    return options.build()


def dataclass_to_dict(obj: Any) -> dict[str, Any]:
    """Return plain containers of plain values, ready for JSON or YAML."""
    assert dataclasses.is_dataclass(obj) and not isinstance(obj, type), f"not a dataclass: {obj!r}"
    return _plain(dataclasses.asdict(obj))


def print_text(text: str) -> None:
    """Print to stdout, which may be a closed pipe (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_config_file(path: str | os.PathLike) -> dict[str, Any]:
    """Return the mapping in a YAML file, with `${a.b}` left unresolved."""
    return read_yaml_file(path)[0]


def dump_config(config: Any, path: str | os.PathLike, log_config: bool = True) -> None:
    """Write a config dataclass or mapping as YAML, atomically and without its secrets."""
    text = config_as_yaml(config)
    write_atomic(path, text)
    if log_config:
        logger.info("Configuration of this run:\n%s", text)


def config_as_yaml(config: Any) -> str:
    """Format a config dataclass or mapping as YAML, without its secrets."""
    utils = import_optional("omegaconf._utils", extra="", needed_by="writing YAML")
    yaml = import_optional("yaml", extra="", needed_by="writing YAML")
    plain = _plain(config) if isinstance(config, Mapping) else dataclass_to_dict(config)
    # What OmegaConf.to_yaml does with a container, which takes three times as long to make.
    return yaml.dump(
        redact_all(plain),
        Dumper=utils.get_omega_conf_dumper(),
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
    )


def flatten_dict(d: Mapping[str, Any], parent_key: str = "", sep: str = "_") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a_b": 1}; empty mappings stay as values."""
    flat: dict[str, Any] = {}
    for key, value in d.items():
        name = f"{parent_key}{sep}{key}" if parent_key else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(flatten_dict(value, name, sep))
        else:
            flat[name] = value
    return flat


def diff_configs(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """List what changed between two configs, sorted: ["optim.lr: 0.0003 -> 0.0001"].

    An option that `old` lacks is newer, and not a change if `new` has its value in `defaults`.
    """
    before, after = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
    before = {k: v for k, v in flatten_dict(defaults or {}, sep=".").items() if k in after} | before

    def text(values: dict[str, Any], key: str) -> str:
        return format_value(values[key]) if key in values else "(absent)"

    def is_changed(key: str) -> bool:
        if key in before and key in after:
            return before[key] != after[key]
        return key in after or not why_ignored(key)

    return [
        f"{key}: {text(before, key)} -> {text(after, key)}"
        for key in sorted(before | after)
        if is_changed(key)
    ]


def _split_option(arg: str) -> tuple[str, str]:
    name, equals, value = arg.partition("=")
    if arg.startswith("-"):
        bare = name.lstrip("-").replace("-", "_")
        raise UserError(f"{arg}: options have no dashes here; write {bare}={value or 'VALUE'}")
    if not equals or not name.strip():
        raise UserError(f"{arg}: write option=value, or config=FILE.yaml")
    return name.strip(), value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
