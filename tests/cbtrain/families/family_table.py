"""The families' table in `cbtrain/model/README.md`: made from what every model type of transformers is run through.

    PYTHONPATH=.:tests/helpers python tests/cbtrain/families/family_table.py [MODEL_TYPE ...]

All of them take some five minutes on one core and rewrite the table; those named are run and printed alone.
"""

import re
import sys
import tempfile
import textwrap
import traceback
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import transformers
from run_family import Outcome, run
from tiny_configs import MODEL_TYPES

README = Path(__file__).parents[3] / "cbtrain" / "model" / "README.md"
WIDTH = 120
_ORDER = ("works", "refused", "not tried", "ends in a traceback")
_GROUP = re.compile(r"^- \*\*(?P<what>.*?)\*\* \(\d+\): (?P<types>.*?)(?=^- |^\Z|^$)", re.MULTILINE | re.DOTALL)


def group(outcome: Outcome) -> str:
    """What the table calls an outcome; no two outcomes that differ share a name."""
    return f"{outcome.kind}: {outcome.reason}" if outcome.reason else outcome.kind


def render(outcomes: dict[str, Outcome]) -> str:
    """The table: a paragraph for each group, those that work first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for model_type, outcome in outcomes.items():
        groups[group(outcome)].append(model_type)
    counts = {kind: sum(outcome.kind == kind for outcome in outcomes.values()) for kind in _ORDER}
    counted = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    largest = max((outcome.deviation for outcome in outcomes.values()), default=0.0)
    lines = [
        f"Of {len(outcomes)} (transformers {transformers.__version__}): {counted}; largest deviation {largest:.0e}."
    ]
    for what in sorted(groups, key=lambda what: (_ORDER.index(what.partition(":")[0]), -len(groups[what]), what)):
        text = f"- **{what}** ({len(groups[what])}): {', '.join(sorted(groups[what]))}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([lines[0], "", *lines[1:]]) + "\n"


def parse(text: str) -> dict[str, str]:
    """The group of each model type in a table."""
    found: dict[str, str] = {}
    for entry in _GROUP.finditer(text):
        for model_type in re.split(r",\s+", entry["types"].strip()):
            assert model_type not in found, model_type
            found[model_type] = " ".join(entry["what"].split())
    return found


def outcomes_of(model_types: Iterable[str]) -> dict[str, Outcome]:
    """Run model types one after the other; what ends in a traceback is printed and goes on."""
    found = {}
    for model_type in model_types:
        with tempfile.TemporaryDirectory() as directory:
            try:
                found[model_type] = run(model_type, Path(directory))
            except Exception as error:  # the table's fourth kind
                traceback.print_exc()
                found[model_type] = Outcome("ends in a traceback", type(error).__name__)
        print(f"{model_type}: {group(found[model_type])} ({found[model_type].deviation:.0e})", flush=True)
    return found


def main(named: list[str]) -> int:
    """Run the command; its exit status is 1 where something ended in a traceback."""
    import torch

    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    outcomes = outcomes_of(named or MODEL_TYPES)
    if not named:
        before, mark, _ = README.read_text().partition("<!-- the table -->\n")
        README.write_text(f"{before}{mark}{render(outcomes)}")
    return int(any(outcome.kind == "ends in a traceback" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
