"""The command line from dataclasses: a preset gives the defaults, every field is a flag, errors are one line."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from cbtrain.config.help import ASKED, Help, page
from cbtrain.config.presets import PRESETS, canonical, get_config
from cbtrain.config.schema import CircuitBreakerConfig
from cbtrain.config.validation import flag, nearest
from cbtrain.utils.errors import FailedError, InputError, reason

Settings = TypeVar("Settings", bound=Any)
PLAIN = Help()


def parse(
    settings_type: type[Settings],
    argv: Sequence[str],
    prog: str,
    recorded: CircuitBreakerConfig | None = None,
    *,
    derived: Callable[[str, bool], CircuitBreakerConfig],
    about: Help = PLAIN,
) -> Settings:
    """Parse `argv` into `settings_type`, a dataclass with the fields `preset` and `config`.

    The preset named in `argv`, or the configuration `recorded` by an earlier run in its place, gives the defaults of
    `config`, whose fields are flags beside the dataclass's own. Where neither is given and a `--model` is, they are
    those of the preset `auto`, which `derived` makes for a model and whether its own code may run. Underscores in flags
    are read as hyphens, and `--config` as `--preset`. `about` is what `--help` says beside what the fields say.

    Raises:
        InputError: an unknown flag, with the nearest one, or a value that does not fit.
        SystemExit: `--help` or `--help-all`, with status 0.
    """
    argv = ["--preset" + arg.removeprefix("--config") if arg.split("=")[0] == "--config" else arg for arg in argv]
    model = value_of("--model", argv)
    preset = canonical(value_of("--preset", argv) or ("tiny" if model in (None, "tiny") else "auto"))
    if asks_for_help(argv):
        named = preset if preset in PRESETS else "tiny"
        default = settings_type(preset="" if recorded else named, config=recorded or get_config(named))
        tell(default, argv, prog, about)
    if recorded is None and preset == "tiny" and model not in (None, "tiny"):
        raise InputError(f"--preset tiny: its numbers are the embedded model's, not those of {model}; leave it out")
    if recorded is None and preset == "auto":
        if not model:
            raise InputError("--preset auto: give the --model that its numbers are derived from")
        recorded = derived(model, is_on("--trust-remote-code", argv))
    default = settings_type(preset=preset, config=recorded or get_config(preset))
    settings, unknown = read(default, argv, prog, about)
    settings.preset = canonical(settings.preset)
    refuse_unknown(unknown, settings_type, settings.config)
    for field in dataclasses.fields(settings.config):
        if getattr(settings.config, field.name) == () and flag(field.name) in argv:
            raise InputError(f"{flag(field.name)}: name at least one")
    return settings


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line is to be answered by what the command's flags are."""
    return any(arg.replace("_", "-") in ASKED for arg in argv)


def tell(default: Any, argv: Sequence[str], prog: str, about: Help) -> NoReturn:
    """Print a command's help, all of it for `--help-all`, and end with status 0."""
    print(page(default, prog, about, every=any(arg.replace("_", "-") == "--help-all" for arg in argv)), end="")
    raise SystemExit(0)


def read(default: Settings, argv: Sequence[str], prog: str, about: Help = PLAIN) -> tuple[Settings, list[str]]:
    """The dataclass `default` with what `argv` replaces of it, and the words of `argv` that belong to no flag.

    Raises:
        InputError: a value that does not fit.
        SystemExit: `--help` or `--help-all`, with status 0.
    """
    if asks_for_help(argv):
        tell(default, argv, prog, about)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                type(default),
                prog=prog,
                default=default,
                args=argv,
                return_unknown_args=True,
                add_help=False,
                config=[tyro.conf.OmitArgPrefixes],
            )
    except SystemExit:
        raise InputError(_in_our_words(_unboxed(captured.getvalue()))) from None


def refuse_unknown(unknown: Sequence[str], *flagged: Any) -> None:
    """Raise `InputError` for the first word that is no flag of these dataclasses, with the nearest one."""
    if unknown:
        names = [field.name for each in flagged for field in dataclasses.fields(each) if field.name != "config"]
        word = unknown[0].split("=")[0]
        raise InputError(f"{word}: no such flag{nearest(word, list(map(flag, names)))}; --help-all lists them")


_stopped: list[int] = []
"""Exit statuses of the signals that came. Libraries that wait in C raise a `KeyboardInterrupt` of their own for any of
them, and some that are just being imported make another error of it."""
_asking: list[Callable[[], None]] = []
"""What the first signal calls, in place of stopping the program at once."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that stop a program: SLURM sends SIGUSR1 a while before the time limit, where it is asked to."""
GRACE_S = 15.0
"""How long a program that was asked to stop goes on at most: SLURM, for one, kills what is there after 30 s."""
WILL_STOP = f"stopping  at a checkpoint, within {GRACE_S:.0f} s (a second signal: at once)"
_ONE_PRESS_S = 0.3
"""A terminal that closes sends its signal twice, and `timeout` sends it to the program and to its group."""


def catch_signals() -> None:
    """Have the other signals stop the program as Ctrl-C does, and note which came; Ray puts handlers of its own there.

    Some libraries would catch a `SystemExit`.
    """
    came = -_ONE_PRESS_S

    def stop(number: int, _frame: object) -> None:
        nonlocal came
        first, again = not _stopped, time.monotonic() - came < _ONE_PRESS_S
        came = time.monotonic()
        _stopped.append(130 if number == signal.SIGINT else 143)
        if not _asking:
            raise KeyboardInterrupt
        if first:
            _asking[-1]()
        elif not again:
            raise KeyboardInterrupt

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup asks for that
            signal.signal(number, stop)


@contextlib.contextmanager
def asked_first(ask: Callable[[], None]) -> Iterator[None]:
    """For the body the first signal only calls `ask`, that the body may end well, within `GRACE_S` seconds; a second
    one stops the program at once.

    Args:
        ask: called in a thread, since a signal may come in the midst of whatever it uses.
    """
    ended = threading.Event()

    def watch() -> None:
        ask()
        if not ended.wait(GRACE_S):
            os.kill(os.getpid(), signal.SIGTERM)

    def asked() -> None:
        threading.Thread(target=watch, daemon=True).start()

    _asking.append(asked)
    try:
        yield
    finally:
        _asking.remove(asked)
        ended.set()


def run(main: Callable[[], int]) -> int:
    """The exit status of a command: 2 for bad input and 1 for a full disk or another failure, in one line;
    130 or 143 when stopped."""
    _stopped.clear()
    catch_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "β" is no reason to stop
    try:
        return main()
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return _interrupted() if _stopped else _ended_by(error)


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return _stopped[0] if _stopped else 130


def _ended_by(error: Exception) -> int:
    """The exit status for what is the user's to mend, when it was told; anything else is raised again."""
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, FailedError):
        print(f"error: {error}", file=sys.stderr)
        return 1
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, OSError):
        print(f"error: {error.filename or 'writing'}: {reason(error)}", file=sys.stderr)
        return 1
    raise error


def value_of(name: str, argv: Sequence[str]) -> str | None:
    """What follows a flag that decides about others' defaults, before anything is parsed; None without it."""
    value = None
    for index, arg in enumerate(argv):
        given, _, joined = arg.partition("=")
        if given.replace("_", "-") == name:
            value = joined or next(iter(argv[index + 1 :]), None)
    return value  # of several the last, as the parser takes it


def is_on(name: str, argv: Sequence[str]) -> bool:
    """Whether a flag without a value is given, before anything is parsed, and not taken back by its `--no-` behind."""
    words = [arg.replace("_", "-") for arg in argv]
    given = [word for word in words if word in (name, f"--no-{name.removeprefix('--')}")]
    return given[-1:] == [name]


def _unboxed(message: str) -> str:
    """The first paragraph of an error that the parser drew in a box below its title, on one line."""
    lines = [line.strip("│ ") for line in message.strip().splitlines()[1:]]
    paragraphs = [list(group) for ruled, group in itertools.groupby(lines, _is_rule) if not ruled]
    return " ".join(paragraphs[0]) if paragraphs else message.strip()


_PARSER_SAYS = (
    (r"Error parsing (--\S+): invalid literal for int\(\) with base 10: '(.*)'", "{0} {1}: must be a whole number"),
    (r"Error parsing (--\S+): could not convert string to float: '(.*)'", "{0} {1}: must be a number"),
    (r"invalid choice '(.*)' for argument '(--\S+)'\. Expected one of \((.*)\)\.", "{1} {0}: must be one of {2}"),
    (r"Missing value for argument '(--\S+)'\..*", "{0}: give a value behind it"),
    (r"Error parsing (--\S+): Could not find valid parse for arguments: \['(.*)'\]", "{0} {1}: must be whole numbers"),
    (r"Error parsing (--\S+): (.*)", "{0}: {1}"),
)
"""What the parser says of a value, and how a line here says it."""


def _in_our_words(message: str) -> str:
    """The parser's message as flag, value and mend, where it is a known one."""
    for pattern, words in _PARSER_SAYS:
        if found := re.fullmatch(pattern, message):
            return words.format(*found.groups())
    return message


def _is_rule(line: str) -> bool:
    return set(line) <= set("─╭╮╰╯- ")
