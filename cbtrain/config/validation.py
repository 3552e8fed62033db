"""What a field of a configuration may hold, and the words for it when it holds something else."""

import difflib
import math
from typing import Any, Literal, get_args, get_origin


def flag(field_name: str) -> str:
    """The command-line flag of a configuration field."""
    return "--" + field_name.replace("_", "-")


def nearest(word: str, known: list[str]) -> str:
    """`"; did you mean X?"` for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; an int serves as a float, which must be finite."""
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(fits(value, alternative) for alternative in get_args(hint))
    return isinstance(value, hint) and not isinstance(value, bool)


def described(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each {described(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(described(alternative) for alternative in get_args(hint))
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    return words.get(hint, "None")
