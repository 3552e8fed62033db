"""Errors as one line, for a screen or a column of a table."""


class InputError(ValueError):
    """Something the user gave is wrong. Its text is one line: where, what, and the mend."""


class FailedError(RuntimeError):
    """A command cannot go on, by no fault in what it was given. Its text is one line: why, and how to go on."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error's text that says something; its type's name where it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    unsaid = type(error).__name__ if isinstance(error, BaseException) else ""
    return next(filter(None, lines), unsaid)


def reason(error: OSError) -> str:
    """What the system says of a file, without its name: `No space left on device`."""
    return error.strerror or first_line(error)


def named(error: BaseException) -> str:
    """`ValueError: what it says`, on one line; the type alone where it says nothing."""
    kind, text = type(error).__name__, first_line(error)
    return kind if text == kind else f"{kind}: {text}"
