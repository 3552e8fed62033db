"""What a sweep is made from: its model and data, read once before it begins, and told by content when it goes on."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbtrain.config import CircuitBreakerConfig, InputError, get_config
from cbtrain.model.identity import identities
from sweeps.reporting.screen import SCREEN

if TYPE_CHECKING:
    from cbtrain.data.dataset import CircuitBreakerData


def read_inputs(
    config: CircuitBreakerConfig, preset: str, workers: int, record: Mapping[str, Any]
) -> "tuple[CircuitBreakerConfig, CircuitBreakerData]":
    """Read the model's structure and the data, so that what is wrong with them is said now, and print what was read.

    Args:
        config: of every trial, as given.
        preset: its name.
        workers: processes a trial.
        record: the content of sweep.json; `inputs` in it are what a sweep that is resumed was made from.

    Returns:
        The configuration of every trial, with paths that hold wherever its process starts, and the rows.
    """
    from cbtrain.utils.environment import quiet_libraries

    SCREEN.begin("loading", "libraries")
    quiet_libraries()
    from cbtrain.data.batches import check_batch
    from cbtrain.data.checks import description
    from cbtrain.model import tiny
    from cbtrain.model.auto import reasons
    from cbtrain.model.checks import check_fit, prepare
    from cbtrain.model.loading import resolve
    from sweeps.reporting.console import indented

    SCREEN.end()  # the embedded model may be built, with a bar of its own
    config = resolve(config)
    if "inputs" in record:
        if Path(config.model) == tiny.cache_directory():
            tiny.build()  # a cache may be emptied
        require_unchanged(record["inputs"], config)
    check_batch(config, workers)
    with SCREEN.phase("reading", "model and data"):
        data, _ = prepare(config)
        layers = check_fit(config)
    if record.get("tokens", data.fingerprint) != data.fingerprint:
        raise InputError(
            "the rows' tokens are not those that the sweep began with, although the files are: another version of this "
            "package, of transformers or of the tokenizer reads them otherwise; go back to it, or begin another sweep"
        )
    model = record["config_overrides"].get("model", get_config(preset).model)
    SCREEN.say(f"KL ablation · preset {preset} · model {model} ({layers} layers)")
    first, *rest = description(data)
    if preset == "auto":
        SCREEN.say(*(line for text in reasons(config) for line in indented(text)))
    SCREEN.say(f"data      {first}", *(line for text in rest for line in indented(text)))
    return with_absolute_paths(config), data


def predicted_memory(
    config: CircuitBreakerConfig, data: "CircuitBreakerData", workers: int, gpus_per_worker: float | None
) -> str:
    """What a worker of a trial is predicted to need, in words."""
    import torch
    from rich.filesize import decimal

    from cbtrain.training.memory_estimate import predict_run

    on_gpu = torch.cuda.is_available() if gpus_per_worker is None else gpus_per_worker > 0
    # Any weight above 0 needs the same, and 0 less.
    config = dataclasses.replace(config, beta_kl=1.0)
    try:
        peak = predict_run(config, data, world_size=workers, cuda=on_gpu).peak
    except ValueError as error:
        return f"not predicted: {error}"
    needed = decimal(peak)
    return f"{needed} a worker at its peak, predicted, libraries aside"


def with_absolute_paths(config: CircuitBreakerConfig) -> CircuitBreakerConfig:
    """The same files wherever a trial's process starts; names that are no file or directory here are the hub's."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).exists() else name

    return dataclasses.replace(
        config,
        model=absolute(config.model),
        tokenizer=config.tokenizer and absolute(config.tokenizer),
        harmful=tuple(map(absolute, config.harmful)),
        benign=tuple(map(absolute, config.benign)),
    )


def require_unchanged(recorded: Mapping[str, str], config: CircuitBreakerConfig) -> None:
    """Raise `InputError` naming the first file that is not what it was when the sweep began."""
    for name in recorded:
        if Path(name).is_absolute() and not Path(name).is_file():
            raise InputError(f"{name}: gone since the sweep began; put it back, or begin another sweep")
    now = identities(config)
    for name, identity in recorded.items():
        if now.get(name, identity) != identity:
            raise InputError(f"{name}: changed since the sweep began; put it back as it was, or begin another sweep")
