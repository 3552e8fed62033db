"""What a field of a configuration or a key of a file may hold, by pydantic, and one line for what it must hold instead.

Pydantic takes 0.2 s to import, so only what checks something imports it.
"""

import difflib
import functools
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from cbtrain.utils.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Shape = TypeVar("Shape")


def flag(field_name: str) -> str:
    """The command-line flag of a configuration field."""
    return "--" + field_name.replace("_", "-")


def nearest(word: str, known: list[str]) -> str:
    """`"; did you mean X?"` for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def check_fields(values: object, declared: type) -> None:
    """See that every field which the dataclass `declared` has is of its type and within its bounds in `values`.

    Bounds are `annotated_types` beside the field's type; a text there is what is said of a number out of them.

    Raises:
        InputError: `--flag value: mend`, for the first field that is not.
    """
    for name, hint in get_type_hints(declared, include_extras=True).items():
        if mend := misfit(getattr(values, name), hint):
            raise InputError(f"{flag(name)} {getattr(values, name)}: {mend}")


def misfit(value: object, hint: Any) -> str:
    """What a field of type `hint` must hold, where `value` does not fit; empty where it does.

    An int serves as a float, which must be finite; nothing else is converted.
    """
    from pydantic import ValidationError

    try:
        _adapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
    else:
        return ""
    said = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, str)]
    match problem["type"]:
        case "greater_than" | "greater_than_equal" | "less_than" | "finite_number" if said:
            return said[0]
        case "greater_than":
            return f"must be more than {problem['ctx']['gt']:g}"
        case "greater_than_equal":
            return f"must be {problem['ctx']['ge']:g} or more"
    return f"must be {described(hint)}"


@functools.cache
def _adapter(hint: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    # Of a dataclass in a field pydantic takes no configuration but its own.
    return TypeAdapter(hint, config=None if is_dataclass(hint) else {"allow_inf_nan": False})


def described(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) is Annotated:
        return described(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each {described(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(described(alternative) for alternative in get_args(hint))
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    return words.get(hint, "None")


def from_json(text: str | bytes, shape: type[Shape]) -> Shape:
    """What a JSON text holds, as the dataclass or dict `shape`; keys that a dataclass does not have are left out.

    Raises:
        InputError: what is wrong, for the caller to put the file's name before: `not JSON (…)`, `no settings in it`,
            `settings.confidence should be a valid number`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        raise InputError(f"not JSON ({problem['ctx']['error']})")
    # What is no object has not even the first of the fields.
    place = ".".join(map(str, problem["loc"])) or (fields(shape)[0].name if is_dataclass(shape) else "object")
    if problem["type"] in ("missing", "dataclass_type", "dict_type"):
        raise InputError(f"no {place} in it")
    raise InputError(f"{place} {problem['msg'].removeprefix('Input ')}")
