"""Fill config dataclasses with OmegaConf; every error names the dotted option.

OmegaConf checks and converts values, and resolves `${a.b}` and `???`. Added here: an option that is
not a section is replaced, never merged; 1e5 fits an integer; `true` is not text; floats are finite.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
import typing
from collections.abc import Container, Mapping
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

from lingua.config.help import (
    dataclass_in,
    describe_type,
    field_types,
    format_value,
    union_members,
    walk_fields,
)
from lingua.config.ignored import ignore
from lingua.config.yaml import yaml_value
from lingua.errors import UserError, first_line, import_optional

T = TypeVar("T")
SECTION: dict[str, Any] = {}  # the value of a section whose options are given one by one


class Text(str):
    """A value as typed on the command line, to be read by the type of its option."""


class Given(NamedTuple):
    value: Any
    hint: Any
    place: str = ""  # "run.yaml:3: " for an option from a file
    is_typed: bool = False  # on the command line


class Options(Generic[T]):
    """Options of the dataclass `cls`, by dotted name. `strict=False` ignores unknown ones."""

    def __init__(self, cls: type[T], strict: bool = True):
        self.cls = cls
        self.strict = strict
        self.given: dict[str, Given] = {}

    def add(self, data: Mapping[str, Any], lines: Mapping[str, str] | None = None) -> None:
        """Merge sections option by option, and replace everything else, dicts included.

        A key may be dotted. `lines` maps dotted names to "file:line".
        """
        self._add(self.cls, data, "", lines or {})

    def build(self) -> T:
        """Construct the dataclass, inner sections first."""
        omegaconf = import_optional("omegaconf", extra="", needed_by="reading options")
        config = copy.deepcopy(_defaults(self.cls))
        for name, (value, hint, *_) in self.given.items():
            try:
                if value is SECTION:
                    if omegaconf.OmegaConf.select(config, name) is not None:
                        continue
                    value = dataclass_in(hint)
                omegaconf.OmegaConf.update(config, name, _fit(hint, value), merge=False)
            except omegaconf.errors.GrammarParseError as error:
                raise self._wrong(name, first_line(error)) from None
            except (omegaconf.errors.OmegaConfBaseException, ValueError):
                raise self._wrong(name, _expected(hint, value)) from None
        return self._construct(omegaconf, config, "")

    def _add(
        self, cls: type, data: Mapping[str, Any], above: str, lines: Mapping[str, str]
    ) -> None:
        for key, value in data.items():
            place = f"{lines[above + key]}: " if above + key in lines else ""
            field, _, rest = key.partition(".")
            field = getattr(cls, "ALIASES", {}).get(field, field)
            if field not in field_types(cls):
                if not ignore(above + field, value) and self.strict:
                    raise UserError(place + unknown_option(self.cls, cls, above, field))
                continue
            name, hint = above + field, field_types(cls)[field]
            section, is_typed = dataclass_in(hint), isinstance(value, Text)
            if rest:
                value = {rest: value} if section else self._with_key(name, hint, rest, value)
            elif is_typed:
                value = read_text(hint, value, name)
            if isinstance(value, str) and (named_by := getattr(section, "NAMED_BY", None)):
                value = {named_by: value}
            if section and isinstance(value, Mapping):
                if name not in self.given or self.given[name].value is None:
                    self.given[name] = Given(SECTION, hint, place)
                self._add(section, value, f"{name}.", lines)
                continue
            for old in [o for o in self.given if f"{o}.".startswith(f"{name}.")]:
                del self.given[old]
            # An empty section in YAML (`optim:`) reads as null and means the defaults.
            if value is not None or section is None or type(None) in union_members(hint):
                self.given[name] = Given(value, hint, place, is_typed)

    def _with_key(self, name: str, hint: Any, key: str, value: Any) -> dict[str, Any]:
        """Add a key to a dict. The first one on the command line replaces the dict of the file."""
        types = [typing.get_args(m)[1] for m in union_members(hint) if typing.get_origin(m) is dict]
        if not types:
            raise UserError(f"{name}.{key}: {name} is {describe_type(hint)}; set {name}=VALUE")
        is_typed = isinstance(value, Text)
        old = self.given.get(name, Given({}, hint))
        before = old.value if old.is_typed == is_typed and isinstance(old.value, dict) else {}
        return before | {key: read_text(types[0], value, f"{name}.{key}") if is_typed else value}

    def _construct(self, omegaconf: Any, config: Any, above: str) -> Any:
        section = dataclass_in(omegaconf.OmegaConf.get_type(config))
        if section is None:
            return omegaconf.OmegaConf.to_container(config, resolve=True)
        values = {}
        for key in field_types(section):
            name = above + key
            try:
                value = config[key]
                if omegaconf.OmegaConf.is_config(value):
                    value = self._construct(omegaconf, value, f"{name}.")
            except omegaconf.MissingMandatoryValue:
                raise UserError(f"{name} is not set; give it as {name}=...") from None
            except omegaconf.errors.OmegaConfBaseException as error:
                raise self._wrong(name, first_line(error)) from None
            if isinstance(value, float) and not math.isfinite(value):
                raise self._wrong(name, "expected a finite number")
            values[key] = value
        try:
            return section(**values)
        except UserError as error:
            raise UserError(with_path(str(error), above, values)) from None

    def _wrong(self, name: str, why: str) -> UserError:
        given = self.given.get(name, Given("", Any))
        return UserError(f"{given.place}{name}={format_value(given.value)}: {why}")


@cache
def _defaults(cls: type) -> Any:
    """Return OmegaConf's tree of `cls`. A copy takes 5 ms, making it 50 ms."""
    omegaconf = import_optional("omegaconf", extra="", needed_by="reading options")
    return omegaconf.OmegaConf.structured(cls)


def read_text(hint: Any, text: str, name: str) -> Any:
    """Read a value of the command line as YAML; a text field keeps it as typed, unless quoted."""
    members = union_members(hint)
    try:
        value = yaml_value(text)
    except ValueError as error:
        if str in members:
            return str(text)
        raise UserError(f"{name}={text}: not YAML: {error}") from None
    if str not in members:
        return value
    if value is None:  # `name=` is empty text, `name=null` is an error unless null is allowed
        return None if text.strip() or type(None) in members else ""
    is_quoted = isinstance(value, str) and text.lstrip()[:1] in ("'", '"')
    is_other = not isinstance(value, str) and type(value) in members  # 3, for `int | str`
    return value if is_quoted or is_other else str(text)


def _fit(hint: Any, value: Any) -> Any:
    """Convert 1e5 to an integer; ValueError for `true` as text and for 2 as a switch."""
    members = union_members(hint)
    if isinstance(value, float) and value.is_integer() and int in members and float not in members:
        return int(value)
    if isinstance(value, bool) and str in members and bool not in members:
        raise ValueError
    if value not in (0, 1) and isinstance(value, int) and bool in members and int not in members:
        raise ValueError
    return value


def _expected(hint: Any, value: Any) -> str:
    members, advice = union_members(hint), ""
    if isinstance(value, bool) and str in members:
        advice = f"; quote it for the text: '{format_value(value)}'"
    elif isinstance(value, str) and any(typing.get_origin(m) is list for m in members):
        advice = f"; a list is written [{value}]"
        if "," in value:
            advice += f', and a list of one item ["{value}"]'
    return f"expected {describe_type(hint)}{advice}"


def unknown_option(root: type, cls: type, above: str, key: str) -> str:
    """Explain that the section `cls` at `above` ("optim.", say) has no option `key`."""
    siblings = list(field_types(cls))
    everywhere = [doc.path for doc in walk_fields(root)]
    initials = "".join(word[:1] for word in key.split("_"))  # lr for learning_rate
    close = [initials] if initials in siblings else difflib.get_close_matches(key, siblings, n=1)
    guesses = [above + match for match in close]
    guesses += [path for path in everywhere if path.rpartition(".")[2] == key][:2]
    guesses = guesses or difflib.get_close_matches(above + key, everywhere, n=1, cutoff=0.8)
    if guesses:
        advice = f"did you mean {' or '.join(dict.fromkeys(guesses))}?"
    else:
        advice = f"known here: {', '.join(siblings)}"
    where = getattr(root, "OTHER_OPTIONS", "")
    return f"unknown option {above}{key}; {advice}{where}"


def with_path(message: str, above: str, fields: Container[str]) -> str:
    """Complete the name of an option that begins the message of the section at `above`.

    A section that several programs share knows its own options, but not where it is nested.
    """
    named = re.match(r"[\w.]+", message)
    own = named[0].rpartition(".")[2] if named else ""
    if not above or not named or own not in fields or f".{named[0]}".endswith(f".{above}{own}"):
        return message
    return re.sub(rf"(?<![\w.]){re.escape(named[0])}(?![\w.])", f"{above}{own}", message)
