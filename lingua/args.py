"""Configuration: dataclasses filled from defaults, a YAML file and the command line, in that order.

    args = parse_args(TrainArgs, sys.argv[1:], prog="python -m apps.LT2.train")

reads `config=run.yaml optim.lr=1e-3 data.sources.wiki=0.5`. What a user can mend ends as a
UserError of one line: an unknown option, a value of the wrong type, a file that is no YAML.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from lingua.config.from_dict import Reader, unknown_option
from lingua.config.help import (
    dataclass_in,
    describe_type,
    field_default,
    field_types,
    format_help,
    format_value,
    union_members,
)
from lingua.config.yaml import read_yaml_file, yaml_value
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
    description: str = "",
    examples: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> T:
    """Read `[config=FILE.yaml] [a.b=c ...]` into a `cls`; `--help` prints every option and exits.

    Where `cls` has a field `config` of its own, `config=` sets that field and no file is read. The
    argument `config` is a mapping in a file's place.
    """
    if "-h" in argv or "--help" in argv:
        print_text(format_help(cls, prog=prog, description=description, examples=examples))
        raise SystemExit(0)
    options = [_split_option(arg) for arg in argv]
    data: dict[str, Any] = _plain(config or {})
    origins: dict[str, str] = {}
    if config is None and "config" not in field_types(cls):
        files = [value for name, value in options if name == "config"]
        options = [(name, value) for name, value in options if name != "config"]
        if len(files) > 1:
            raise UserError(f"config= is given {len(files)} times ({', '.join(files)}): keep one")
        if files:
            data, origins = read_yaml_file(files[0])
    overrides: dict[str, Any] = {}
    for name, text in options:
        keys, hint = _locate(cls, name)
        before = _get(overrides, keys)
        _set(overrides, keys, _merge(hint, before, _read_text(hint, text, name)))
        path = ".".join(keys)
        origins = {p: o for p, o in origins.items() if p != path and not p.startswith(path + ".")}
    data = _merge(cls, data, overrides)
    return Reader(cls, origins).section(cls, _interpolate(cls, data), "")


def dataclass_from_dict(cls: type[T], data: Mapping[str, Any], strict: bool = True) -> T:
    """Build `cls`, nested sections included; `strict=False` passes over unknown keys."""
    plain = _plain(data)
    return Reader(cls, {}, strict).section(cls, _interpolate(cls, plain), "")


def dataclass_to_dict(obj: Any) -> dict[str, Any]:
    """Plain containers of plain values, ready for JSON or YAML."""
    assert dataclasses.is_dataclass(obj) and not isinstance(obj, type), f"no dataclass: {obj!r}"
    return _plain(dataclasses.asdict(obj))


def print_text(text: str) -> None:
    """Print for a person, who may look at the head of it alone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head`; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_config_file(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file; interpolations `${a.b}` are left for dataclass_from_dict."""
    return read_yaml_file(path)[0]


def dump_config(config: Any, path: str | os.PathLike, log_config: bool = True) -> None:
    """Write a config dataclass (or mapping) as YAML, whole or not at all, without its secrets."""
    text = config_as_yaml(config)
    write_atomic(path, text)
    if log_config:
        logger.info("Configuration of this run:\n%s", text)


def config_as_yaml(config: Any) -> str:
    """A config dataclass (or mapping) as a file has it, without its secrets."""
    omegaconf = import_optional("omegaconf", extra="", needed_by="writing YAML")
    plain = _plain(config) if isinstance(config, Mapping) else dataclass_to_dict(config)
    return omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.create(redact_all(plain)))


def flatten_dict(d: Mapping[str, Any], parent_key: str = "", sep: str = "_") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a_b": 1}; empty mappings stay as values."""
    flat: dict[str, Any] = {}
    for key, value in d.items():
        name = f"{parent_key}{sep}{key}" if parent_key else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(flatten_dict(value, name, sep))
        else:
            flat[name] = value
    return flat


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configs: ["optim.lr: 0.0003 -> 0.0001"], sorted by option."""
    before, after = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
    changed = [k for k in before | after if k not in before or k not in after]
    changed += [k for k in before if k in after and before[k] != after[k]]

    def text(values: dict[str, Any], key: str) -> str:
        return format_value(values[key]) if key in values else "(absent)"

    return [f"{k}: {text(before, k)} -> {text(after, k)}" for k in sorted(changed)]


# --- the command line ----------------------------------------------------------------------------


def _split_option(arg: str) -> tuple[str, str]:
    name, equals, value = arg.partition("=")
    bare = name.lstrip("-").replace("-", "_")
    if arg.startswith("-"):
        raise UserError(f"{arg}: options have no dashes here, write {bare}={value or 'VALUE'}")
    if not equals or not name.strip():
        raise UserError(f"{arg}: not understood, write option=value (or config=FILE.yaml)")
    return name.strip(), value


def _locate(cls: type, option: str) -> tuple[list[str], Any]:
    """Keys and type of a dotted option.

    Below a mapping of plain values the rest is one key: `data.sources.dclm_1.0` and
    `data.sources[dclm_1.0]` both give ["data", "sources", "dclm_1.0"].
    """
    keys: list[str] = []
    hint: Any = cls
    rest = option
    while rest:
        section, values = dataclass_in(hint), _mapping_values(hint)
        if section is None and values is None:
            raise UserError(
                f"{option}: {'.'.join(keys)} is {describe_type(hint)} and is set whole, "
                f"as {'.'.join(keys)}=VALUE"
            )
        if values is not None and values is not Any and dataclass_in(values) is None:
            key, rest = re.sub(r"^\[(.*)\]$", r"\1", rest), ""
        else:
            head = re.match(r"(?:\[([^\]]+)\]|([^.\[\]]+))(?:\.(?!$)|(?=\[)|$)", rest)
            if head is None:
                raise UserError(
                    f"{option}: not a dotted option name, write for example a.b.c=VALUE"
                )
            key, rest = head[1] or head[2], rest[head.end() :]
        if section is None:
            hint = values
        elif key in field_types(section):
            hint = field_types(section)[key]
        else:
            raise UserError(unknown_option(cls, section, ".".join(keys), key))
        keys.append(key)
    return keys, hint


def _mapping_values(hint: Any) -> Any:
    """Type of a mapping's values; Any for a field that takes anything; None if it is no mapping."""
    for member in union_members(hint):
        if member is Any or member in (dict, Mapping):
            return Any
        if typing.get_origin(member) in (dict, Mapping):
            return typing.get_args(member)[1]
    return None


def _read_text(hint: Any, text: str, option: str) -> Any:
    """Value of a command line text: YAML, but where text is wanted it is kept as typed."""
    members = union_members(hint)
    if str not in members:
        try:
            return yaml_value(text)
        except ValueError as error:
            raise UserError(f"{option}={text}: not readable as YAML: {error}") from None
    try:
        value = yaml_value(text)
    except ValueError:
        return text
    if value is None:
        # `name=` is an empty text; `name=null` is no text, and is refused where a file's would be
        return None if text.strip() or type(None) in members else text
    quoted = isinstance(value, str) and text.lstrip()[:1] in ("'", '"')
    container = isinstance(value, list | dict) and any(
        typing.get_origin(m) in (list, tuple, dict) for m in members
    )
    other = type(value) is not str and type(value) in members  # a number, for `int | str`
    return value if quoted or container or other else text


def _get(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _merge(hint: Any, old: Any, new: Any) -> Any:
    """`new` over `old`: sections are merged option by option, all else is replaced whole."""
    section = dataclass_in(hint)
    if section and isinstance(new, Mapping) and not isinstance(old, Mapping | None):
        return old  # a section that is no section is refused, whatever is set below it
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)) or (
        section is None and Any not in union_members(hint)
    ):
        return new
    hints = field_types(section) if section else {}
    merged = dict(old)
    for key, value in new.items():
        merged[key] = _merge(hints.get(key, Any), old[key], value) if key in old else value
    return merged


# --- interpolation -------------------------------------------------------------------------------


def _interpolate(cls: type, data: dict[str, Any]) -> dict[str, Any]:
    """Resolve OmegaConf's `${a.b}` and `${oc.env:NAME}`; they may point at defaults, too."""
    if not any("${" in text for text in _texts(data)):
        return data
    omegaconf = import_optional("omegaconf", extra="", needed_by="interpolation with ${...}")
    defaults = {}
    for doc_path, default in _defaults(cls):
        _set(defaults, doc_path, default)
    try:
        merged = omegaconf.OmegaConf.merge(defaults, data)
        return _pick(data, omegaconf.OmegaConf.to_container(merged, resolve=True))
    except omegaconf.errors.OmegaConfBaseException as error:
        name = getattr(error, "full_key", "") or "config"
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from None


def _defaults(cls: type, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = field_default(f)
        if isinstance(default, type):
            yield from _defaults(default, (*above, f.name))
        elif default is not dataclasses.MISSING:
            yield (*above, f.name), _plain(default)


def _pick(data: Any, resolved: Any) -> Any:
    """`data` with the values of `resolved`; what only `resolved` has is left out."""
    if isinstance(data, Mapping):
        return {key: _pick(value, resolved[key]) for key, value in data.items()}
    return resolved


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _texts(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _texts(value)


def _plain(value: Any) -> Any:
    """dict, list, str, numbers and None only: what JSON and YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return str(value)
    if type(value).__module__.startswith("omegaconf."):
        omegaconf = import_optional("omegaconf", extra="", needed_by="OmegaConf containers")
        return omegaconf.OmegaConf.to_container(value)
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
