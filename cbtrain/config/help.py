"""What `--help` and `--help-all` say of a command: its flags by group, with meaning, type and default; 80 columns.

Flags, types, defaults and meanings are those of the dataclasses that the command line is parsed into. Beside these a
command declares, as a `Help`, what cannot be read from them.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from cbtrain.config.presets import PRESETS
from cbtrain.config.schema import GROUPS, METAVARS
from cbtrain.config.validation import flag

ASKED = ("-h", "--help", "--help-all")
WIDTH, COLUMN = 80, 29
"""Columns in all, and where the meaning of a flag begins."""
_WORDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

Groups = Mapping[str, tuple[str, ...]]
"""Names of fields by the title of their group."""


@dataclass(frozen=True)
class Help:
    """What a command says of itself beyond its fields."""

    groups: Groups = field(default_factory=dict)
    """The groups of its own fields, and of those of the configuration that stand elsewhere than in `schema.GROUPS`.
    The first comes first; the others stand where the configuration's groups of those titles do."""
    first: tuple[str, ...] = ()
    """Fields that `--help` shows, in this order within their groups; empty for all."""
    examples: tuple[str, ...] = ()
    """Command lines."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """The meaning of fields whose own does not hold for this command."""
    metavars: Mapping[str, str] = field(default_factory=dict)
    """What stands behind the flags of fields whose type does not say it."""


def page(default: Any, prog: str, about: Help, *, every: bool) -> str:
    """The text of `--help`, or with `every` that of `--help-all`.

    Args:
        default: the command's settings, with its configuration under `config` if it has one.
        prog: how the command is run.
    """
    fields = _fields(default)
    shown = tuple(fields) if every or not about.first else about.first
    positional = [metavar_of(each.hint) for each in fields.values() if _is_positional(each.hint)]
    lines = [f"usage: {' '.join([prog, *positional, '[FLAGS]'])}"]
    said = (type(default).__doc__ or "").strip()
    if getattr(default, "preset", ""):
        said += f" Defaults are those of --preset {default.preset}."
    lines += textwrap.wrap(said, WIDTH, break_on_hyphens=False)
    for title, names in grouped(default, about).items():
        here = [name for name in (names if every else shown) if name in names]
        if here:
            lines += ["", f"{title}:"] if every else [f"{title}:"]
            lines += itertools.chain.from_iterable(_entry(fields[name], name, about, whole=every) for name in here)
    if about.examples:
        lines += [*([""] if every else []), "Examples:", *[f"  {line}" for line in about.examples]]
    if len(shown) < len(fields):
        lines.append(f"--help-all shows the other {len(fields) - len(shown)} flags, and more on these.")
    elif any(each.hint is bool for each in fields.values()):
        lines.append("A flag without a value is switched off by --no- before its name.")
    return "\n".join(lines) + "\n"


def grouped(default: Any, about: Help) -> Groups:
    """The fields of a command by group; those of no group stand under "Flags"."""
    known = _fields(default)
    titles = dict.fromkeys([*itertools.islice(about.groups, 1), *GROUPS, *about.groups])
    own = {name for names in about.groups.values() for name in names}
    groups = {
        title: (
            *about.groups.get(title, ()),
            *[name for name in GROUPS.get(title, ()) if name in known and name not in own],
        )
        for title in titles
    }
    members = {name for names in groups.values() for name in names}
    groups["Flags"] = tuple(name for name in known if name not in members)
    return {title: names for title, names in groups.items() if names}


class _Field(NamedTuple):
    """What a dataclass says of one of its fields."""

    hint: Any
    default: object
    meaning: str


def _fields(default: Any) -> dict[str, _Field]:
    """The fields of the settings by name, then those of their configuration."""
    found: dict[str, _Field] = {}
    for holder in (default, getattr(default, "config", None)):
        if holder is None:
            continue
        hints = get_type_hints(type(holder), include_extras=True)
        meanings = _meanings(type(holder))
        for each in dataclasses.fields(holder):
            if each.name != "config":
                meaning = meanings.get(each.name, "")
                found[each.name] = _Field(hints[each.name], getattr(holder, each.name), meaning)
    return found


def _meanings(declared: type) -> dict[str, str]:
    """The text below each field of a dataclass, or of one that it extends, which Python drops, from the source."""
    found: dict[str, str] = {}
    for base in reversed(declared.__mro__[:-1]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # installed without its source
            continue
        assert isinstance(body, ast.ClassDef)
        for before, here in itertools.pairwise(body.body):
            if not (isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)):
                continue
            if isinstance(here, ast.Expr) and isinstance(here.value, ast.Constant):
                found[before.target.id] = " ".join(str(here.value.value).split())
    return found


def _entry(of: _Field, name: str, about: Help, *, whole: bool) -> Iterator[str]:
    """The lines of one flag: what is typed on the left, what it means on the right; in short its first sentence."""
    hint, value, meaning = of
    if name in about.instead:
        meaning = about.instead[name]
    elif not whole:
        meaning = re.split(r"(?<=[^.]\.)\s", meaning)[0]
    if name == "preset":
        meaning += f" One of {', '.join(PRESETS)}."
    metavar = {**METAVARS, **about.metavars}.get(name) or metavar_of(hint)
    left = metavar if _is_positional(hint) else f"{flag(name)} {metavar}".rstrip()
    if len(left) > WIDTH - 2:
        meaning += f" One of {', '.join(metavar.split('|'))}."
        left = f"{flag(name)} CHOICE"
    if not whole:
        meaning = meaning.removesuffix(".")
    if (said := _default(value)) and name not in about.instead:
        meaning += f" ({said})"
    text = textwrap.wrap(meaning, WIDTH - COLUMN, break_on_hyphens=False)
    if len(left) + 4 > COLUMN:
        yield f"  {left}"
        left = ""
    for line in text:
        yield f"  {left:<{COLUMN - 2}}{line}"
        left = ""


def metavar_of(hint: Any) -> str:
    """What is typed behind a flag: `INT`, `PATH`, `gp|tpe|random`, `INT ...`; nothing for a switch."""
    if hint is bool:
        return ""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        given = [mark.metavar for mark in marks if getattr(mark, "metavar", None)]
        return given[0] if given else metavar_of(inner)
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{metavar_of(get_args(hint)[0])} ..."
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(metavar_of(each) for each in get_args(hint) if each is not type(None))
    return _WORDS[hint]


def _default(value: object) -> str:
    """A default for the eye; nothing for what is not set."""
    if value is None or value is False or value in ("", (), Path()):
        return ""
    if value is True:
        return "on"
    return f"default {' '.join(map(_shown, value)) if isinstance(value, tuple) else _shown(value)}"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_positional(hint: Any) -> bool:
    return get_origin(hint) is Annotated and "Positional" in map(str, get_args(hint)[1:])
