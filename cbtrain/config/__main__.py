"""What the presets set, as a table of at most 80 columns.

    python -m cbtrain.config [PRESET]

A preset's name gives all its fields, with the defaults that it replaces.
"""

import dataclasses
import sys

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cbtrain.config.cli import run
from cbtrain.config.presets import PRESETS, get_config
from cbtrain.config.schema import CircuitBreakerConfig
from cbtrain.utils.errors import InputError

_WIDTH = 80
_COLUMNS = ("alpha", "target_layers", "lora_layers", "steps", "warmup_steps", "lr")
"""Fields of the overview that have a column; what a preset sets beside them stands below."""
_UNITS = {
    "max_length": "tokens",
    "eval_fraction": "of the prompts",
    "target_layers": "hidden states",
    "lora_layers": "blocks",
    "batch_size": "rows",
    "micro_batch_size": "rows a worker",
    "warmup_steps": "steps",
    "log_every": "steps",
    "eval_every": "steps",
    "eval_batch_size": "rows",
    "checkpoint_every": "steps",
}
_REMARKS = {
    "auto": "layers, dtype and length by the model that is given",
    "llama-4-scout": "109 B parameters: untested at this size",
}


def main() -> int:
    """Run the command; its exit status."""
    arguments = sys.argv[1:]
    console = Console(width=_WIDTH, highlight=False)
    if arguments in (["-h"], ["--help"]):
        print(__doc__, end="")
    elif not arguments:
        overview(console)
    elif len(arguments) == 1 and not arguments[0].startswith("-"):
        every_field(arguments[0], console)
    else:
        raise InputError(f"{' '.join(arguments)}: give one preset, or nothing for a table of all")
    return 0


def overview(console: Console) -> None:
    """Print all presets: the numbers of the method, then the models and whatever else differs from the default."""
    numbers = _table("preset")
    for name in _COLUMNS:
        unit = f"\n[dim]{_UNITS[name]}[/]" if name in _UNITS else ""
        numbers.add_column(name.removesuffix("_steps").replace("_", " ") + unit, justify="right")
    others = _table("preset")
    others.add_column("model, and what else is not the default")
    for preset in PRESETS:
        config = get_config(preset)
        numbers.add_row(preset, *[shown(name, getattr(config, name)) for name in _COLUMNS])
        words = [_REMARKS.get(preset, "")]
        for name in replaced(config):
            if name not in ("model", *_COLUMNS):
                words.append(f"{name} {shown(name, getattr(config, name))} {_UNITS.get(name, '')}".strip())
        others.add_row(preset, escape("\n".join([config.model, ", ".join(filter(None, words))])))
    default = CircuitBreakerConfig()
    numbers.add_row("[dim]default[/]", *[f"[dim]{shown(name, getattr(default, name))}[/]" for name in _COLUMNS])
    console.print(numbers)
    console.print()
    console.print(others)
    console.print("\npython -m cbtrain.config PRESET lists every field of one; each is a flag.")


def every_field(preset: str, console: Console) -> None:
    """Print all fields of a preset.

    Raises:
        InputError: there is no such preset.
    """
    config, default = get_config(preset), CircuitBreakerConfig()
    table = _table("field")
    table.add_column("value", overflow="fold")
    table.add_column("default, if other")
    differing = replaced(config)
    for field in dataclasses.fields(config):
        name = field.name
        value = f"{shown(name, getattr(config, name))} {_UNITS.get(name, '')}"
        table.add_row(name, escape(value), shown(name, getattr(default, name)) if name in differing else "")
    console.print(table)


def replaced(config: CircuitBreakerConfig) -> list[str]:
    """Names of the fields whose value is not the default."""
    default = CircuitBreakerConfig()
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if getattr(config, name) != getattr(default, name)]


def shown(name: str, value: object) -> str:
    """A field's value for the eye: consecutive numbers as a range, an empty one as a dash."""
    if name == "lora_layers" and value is None:
        return "all"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple) and len(value) > 3 and value == tuple(range(value[0], value[-1] + 1)):
        return f"{value[0]}–{value[-1]}"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "–"
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value in (None, "") else str(value)


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    return table


if __name__ == "__main__":
    sys.exit(run(main))
