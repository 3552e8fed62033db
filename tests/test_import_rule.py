"""The map: which room may know which. Read from the source, so that a deferred import counts too.

A room is a folder, or a module that is a command. It knows itself and the rooms above it in `ROOMS`, and nothing below.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cbtrain", "analysis", "sweeps")
ROOMS = (
    "cbtrain.utils",  #          files, distributed, environment, W&B: nothing of the method
    "cbtrain.config",  #         what a training run is, and how a user says it; no torch
    "cbtrain.losses",  #         tensors in, a loss out
    "cbtrain.data.formats",  #   files to rows
    "cbtrain.data",  #           rows to tokens, split, batches
    "cbtrain.model",  #          base model, adapter, the part of the forward that is needed
    "cbtrain.teacher_cache",  #  the frozen teacher's states on disk
    "cbtrain.evaluation",  #     held-out metrics, and what is generated
    "cbtrain.checkpoints",  #    what a run goes on from
    "cbtrain.training",  #       step, loop
    "cbtrain.calibration",  #    a recipe that reroutes
    "cbtrain.inspect_data",  #   python -m cbtrain.data
    "cbtrain.evaluate",  #       python -m cbtrain.evaluate
    "cbtrain.complete",  #       python -m cbtrain.complete
    "cbtrain.train",  #          python -m cbtrain.train
    "cbtrain.calibrate",  #      python -m cbtrain.calibrate
    "analysis.columns",  #       of trials.csv
    "analysis.formatting",  #    how numbers are written
    "analysis.constraint",  #    what may be lost of the rerouting
    "analysis.noise",  #         seeds against the limit
    "analysis.surrogate",  #     the model of a sweep
    "analysis.rules_of_thumb",
    "analysis.decision",  #      what a decision says
    "analysis.behaviour",  #     what measured models write, and whether it will do
    "analysis.baseline",  #      what the trials without KL say
    "analysis.suspects",  #      trials that most likely failed
    "analysis.verdict",  #       between settings that were assessed
    "analysis.sensitivity",  #   what another limit would choose
    "analysis.decide",  #        trials in, a decision out
    "analysis.trials",  #        a run directory's tables
    "analysis.report",  #        texts, figures, commands
    "analysis.pick_beta",  #     python analysis/pick_beta.py
    "sweeps.plan",  #            which trial comes next; no Ray
    "sweeps.reporting",  #       screen and W&B
    "sweeps.storage",  #         the run directory
    "sweeps.runtime",  #         Ray, its processes, and what goes wrong with them
    "sweeps.execution",  #       trials on Ray
    "sweeps.settings",  #        the command's flags
    "sweeps.kl_ablation",  #     python sweeps/kl_ablation.py
)
TORCH_FREE = ("cbtrain.config", "cbtrain.utils.errors", "cbtrain.utils.files", "cbtrain.utils.metrics_file")
"""What of `cbtrain` `analysis` may know."""
FORBIDDEN = {
    "cbtrain": {"ray", "optuna"},
    "analysis": {"torch", "ray", "optuna", "transformers"},
    "sweeps.plan": {"ray", "torch"},
    **{name: {"torch", "ray", "transformers"} for name in TORCH_FREE},
}
"""Libraries that a package or room must not import."""


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name; a package goes by its own."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).glob("**/*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth and under `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def room(module: str) -> str:
    """The room that a module lies in: the longest of the names that it begins with."""
    found = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    return max(found, key=len, default="")


def known(module: str) -> set[str]:
    """The modules of the three packages that one imports, and the packages which are run on the way to them."""
    named = {name for name in imported(MODULES[module]) if name in MODULES}
    packages = {name.rsplit(".", depth)[0] for name in named for depth in range(1, name.count(".") + 1)}
    return named | {
        name for name in packages if not f"{module}.".startswith(f"{name}.") and any(imported(MODULES[name]))
    }


IMPORTS = {module: known(module) for module in MODULES}
DOOR = "cbtrain.data.__main__"
"""`python -m cbtrain.data`: in the folder of its name, it hands on to the command that lies below."""


def test_every_module_lies_in_a_room_and_every_room_is_there():
    homeless = [module for module in MODULES if not room(module) and module not in PACKAGES]
    assert not homeless
    assert {room(module) for module in MODULES} - {""} == set(ROOMS)


def test_a_room_knows_only_those_before_it():
    upward = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if module != DOOR and ROOMS.index(room(module)) < ROOMS.index(room(other))
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_training_knows_nothing_of_the_sweep_and_analysis_only_what_needs_no_torch():
    wrong = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if (module.startswith("cbtrain") and not other.startswith("cbtrain"))
        or (module.startswith("analysis") and other.startswith("sweeps"))
        or (module.startswith("analysis") and other.startswith("cbtrain") and not other.startswith(TORCH_FREE))
    ]
    assert not wrong


@pytest.mark.parametrize("place", FORBIDDEN)
def test_a_library_stays_where_it_belongs(place):
    wrong = [
        (module, name)
        for module, path in MODULES.items()
        if module == place or module.startswith(f"{place}.")
        for name in imported(path)
        if name.split(".")[0] in FORBIDDEN[place]
    ]
    assert not wrong
