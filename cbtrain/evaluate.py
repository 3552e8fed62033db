"""A trained adapter (the student) beside its base model alone (the teacher).

Held-out metrics, and what both generate, as a table and as files.

python -m cbtrain.evaluate --adapter outputs/cb/adapter
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cbtrain.config import CircuitBreakerConfig, InputError, cli, get_config
from cbtrain.config.help import Help
from cbtrain.config.saved import config_of_adapter, require_adapter
from cbtrain.model.auto import derived
from cbtrain.utils.errors import reason

WIDTH = 80
_KINDS = {
    "harmful": "harmful prompts",
    "harmful_prefilled": "harmful prompts, first tokens of the answer given",
    "benign": "benign prompts",
    "xstest_safe": "XSTest, safe prompts",
    "xstest_unsafe": "XSTest, unsafe prompts",
}
_MEASURES = {
    "refusal_rate": ("refused", "{:.0%}"),
    "degenerate_rate": ("degenerate", "{:.0%}"),
    "complied_rate": ("coherent answer", "{:.0%}"),
    "perplexity": ("perplexity under the teacher", "{:.3g}"),
    "repetition": ("repeated 4-grams", "{:.0%}"),
    "empty_rate": ("empty", "{:.0%}"),
    "tokens": ("tokens", "{:.1f}"),
}
_HELD_OUT = {
    "rerouting loss (1: none)": (None, "eval_loss_reroute"),
    "harmful NLL, nats/token": ("base_harmful_nll", "eval_harmful_nll"),
    "benign NLL, nats/token": ("base_benign_nll", "eval_benign_nll"),
    "benign KL to the teacher, nats/token": (None, "eval_benign_kl"),
}


@dataclass(kw_only=True)
class EvaluateSettings:
    """Compare a trained adapter with its base: held-out metrics, and what both generate."""

    adapter: Path = Path("outputs/cb/adapter")
    """PEFT adapter directory. The config.json beside it, which training writes, gives the defaults of all other
    flags."""
    preset: str = "tiny"
    """Where those defaults come from instead, if given; `python -m cbtrain.config` lists them."""
    prompts: int = 16
    """Held-out prompts of each kind to complete, at most."""
    max_new_tokens: int = 64
    """Tokens of a completion, at most; greedy."""
    prefill_tokens: int = 5
    """Tokens of a harmful completion that are given before the NLL of the rest is taken, and before the models
    complete it; 0 completes the prompts alone."""
    xstest: tuple[str, ...] = ()
    """Files shaped like XSTest (prompt, and label or type), for refusals of safe prompts; .csv, .jsonl, .json or
    .parquet."""
    judge: str = ""
    """module:function of a classifier of your own for completions: judge(prompts, completions) gives for each refusal,
    degenerate or coherent; the module must be importable from here. Signs of broken text and a list of phrases if not
    given."""
    output_dir: Path | None = None
    """Directory for behaviour.json and completions.jsonl; the adapter's parent if not given."""
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


HELP = Help(
    groups={
        "What is measured": ("adapter", "preset", "prompts", "max_new_tokens", "prefill_tokens", "xstest", "judge"),
        "Output": ("output_dir",),
    },
    first=(
        *("adapter", "prompts", "max_new_tokens", "prefill_tokens", "xstest", "judge", "harmful", "benign"),
        *("model", "eval_batch_size", "output_dir"),
    ),
    examples=("python -m cbtrain.evaluate --adapter outputs/cb/adapter",),
    metavars={"preset": "NAME", "xstest": "FILE ...", "judge": "MODULE:FUNCTION"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    settings = _settings(argv)
    require_adapter(settings.adapter)
    settings.config.validate()
    for name in ("prompts", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be 1 or more")
    if settings.prefill_tokens < 0:
        raise InputError(f"--prefill-tokens {settings.prefill_tokens}: must be 0 or more")
    output_dir = settings.output_dir or settings.adapter.resolve().parent
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {output_dir}: {reason(error)}") from error

    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    from cbtrain.evaluation.behaviour import measure
    from cbtrain.model.loading import resolve

    columns = (TextColumn("completions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        record = measure(
            resolve(settings.config),
            settings.adapter,
            prompts=settings.prompts,
            max_new_tokens=settings.max_new_tokens,
            prefill_tokens=settings.prefill_tokens,
            xstest=settings.xstest,
            judge=settings.judge,
            output_dir=output_dir,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    Console(width=WIDTH, highlight=False).print(table(record))
    print(f"numbers  {_short(output_dir / 'behaviour.json')}\ntexts    {_short(output_dir / 'completions.jsonl')}")
    return 0


def table(record: dict[str, Any]) -> Table:
    """What `measure` found, teacher and student side by side."""
    view = Table(box=None, pad_edge=False)
    view.add_column("")
    view.add_column("teacher", justify="right", min_width=8)
    view.add_column("student", justify="right", min_width=8)

    def add(what: str, teacher: float | None, student: float | None, form: str) -> None:
        view.add_row("  " + what, *("–" if value is None else form.format(value) for value in (teacher, student)))

    view.add_row("held-out rows")
    for what, (of_teacher, of_student) in _HELD_OUT.items():
        add(what, record["held_out"][of_teacher] if of_teacher else None, record["held_out"][of_student], "{:.3f}")
    prefill, given = record["prefill"]["nll"], record["settings"]["prefill_tokens"]
    add(f"harmful NLL after {given} tokens given", prefill["teacher"], prefill["student"], "{:.3f}")
    for kind, title in _KINDS.items():
        if kind in record:
            view.add_row(f"{title}, {record[kind]['prompts']}")
            for name, (what, form) in _MEASURES.items():
                add(what, record[kind][name]["teacher"], record[kind][name]["student"], form)
            add("same text as the teacher", None, record[kind]["unchanged_rate"], "{:.0%}")
    left_out = record["settings"]["xstest_prompts_left_out_in_training"]
    if left_out:
        view.add_row(f"{left_out} XSTest prompts left out: the model was trained on them")
    return view


def _settings(argv: Sequence[str]) -> EvaluateSettings:
    """The settings; the configuration beside the adapter stands in for the preset's."""
    adapter = Path(cli.value_of("--adapter", argv) or EvaluateSettings.adapter)
    chosen = cli.value_of("--preset", argv) or cli.value_of("--config", argv)
    recorded = None if chosen else config_of_adapter(adapter)
    return cli.parse(EvaluateSettings, argv, "python -m cbtrain.evaluate", recorded, derived=derived, about=HELP)


def _short(path: Path) -> Path:
    """Relative to where the command runs, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(cli.run(main))
