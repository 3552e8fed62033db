"""What the sweep's command takes: its flags with their meaning, and what is refused of them."""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Lt

from analysis.behaviour.judge import DEFAULT_LIMITS
from analysis.constraint import CONFIDENCE, REROUTE_TOLERANCE
from analysis.surrogate.search_space import BETA_KL_RANGE, KL_TEMPERATURE_RANGE, Bounds
from cbtrain.config import CircuitBreakerConfig, InputError, flag, get_config
from cbtrain.config.help import Help
from cbtrain.config.validation import check_fields
from cbtrain.model.auto import derived

SEARCHED = ("beta_kl", "kl_temperature")


def _bounds(words: list[str], *, or_one: bool) -> Bounds:
    """The ends of a range from the command line; one number, where it may be one, is both."""
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and or_one:
        numbers *= 2
    if len(numbers) != 2:
        given = f" {' '.join(words)}" if words else ""
        raise ValueError(f"must be {'one or two numbers' if or_one else 'two numbers'}, not{given or ' none'}")
    return numbers[0], numbers[1]


def _range_flag(metavar: str, *, or_one: bool) -> tyro.constructors.PrimitiveConstructorSpec[Bounds]:
    """How tyro reads a range, of one flag with all numbers behind it."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=functools.partial(_bounds, or_one=or_one),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda bounds: [f"{bound:g}" for bound in bounds],
    )


@dataclass(kw_only=True)
class SweepSettings:
    """Sweep beta_kl and kl_temperature of a circuit breaker, with a total of --num-samples trials."""

    preset: str = "tiny"
    """Where training's defaults come from; auto, the default with --model, derives them. `python -m cbtrain.config`
    lists them."""
    num_samples: int = 20
    """Trials in all: baseline, ablation, search and confirmation."""
    run_dir: Path | None = None
    """Directory for everything the sweep writes. By default runs/kl_ablation-TIME, or kl_ablation-TIME below
    --storage-path. A relative one is below --storage-path where that is given."""
    storage_path: Path | None = None
    """Directory that all nodes share, for run directories; needed in a Ray job on several nodes. An absolute --run-dir
    or --resume must lie below it."""
    copy_to: str | None = None
    """Where a sweep that has finished is copied, without teacher_cache/, ray/ and checkpoints: a directory, or a URI
    that pyarrow opens (s3://, gs://, hdfs://, file://), credentials from the environment. The copy is URI/NAME, NAME
    being the run directory's."""
    resume: Path | None = None
    """Continue the sweep of this run directory, with its own settings. It was killed, or shall have more trials
    (--num-samples)."""
    baseline_seeds: int | None = None
    """Seeds of the beta_kl = 0 baseline; by default a fifth of the trials, at least 3, at most 8."""
    reroute_tolerance: float = REROUTE_TOLERANCE
    """Share of the baseline's rerouting that a setting may lose."""
    confidence: float = CONFIDENCE
    """Probability of keeping that limit which a recommended setting must reach."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """What searches: gp is the Gaussian process that also decides, tpe and random are Optuna's samplers."""
    beta_kl_range: Annotated[Bounds, _range_flag("LOW HIGH", or_one=False)] = BETA_KL_RANGE
    """What is searched of beta_kl, on a logarithmic scale. Ablation points outside are left out."""
    kl_temperature_range: Annotated[Bounds, _range_flag("LOW [HIGH]", or_one=True)] = KL_TEMPERATURE_RANGE
    """The same of kl_temperature, on a linear scale. A single temperature leaves the search to beta_kl alone."""
    early_stop: bool = False
    """End a search trial whose rerouting stays over the limit; off by default: it saves too little (bench_stopping)."""
    calibrate: bool = False
    """First find lr, steps and retain scale at which the baseline converges, by a ladder of short runs that are no
    trials (at most a fifth of the sweep's steps); on under the presets auto and qwen3-8b. What is given as a flag
    stays."""
    calibration: Path | None = None
    """The calibration.json of an earlier calibration (`python -m cbtrain.calibrate`), whose recipe is taken."""
    max_concurrent: Annotated[int, Ge(1)] | None = None
    """Trials at a time; by default what the machine holds, at most 4."""
    workers_per_trial: Annotated[int, Ge(1)] = 1
    """Worker processes a trial; more than 1, or a GPU, gives each trial workers of its own."""
    gpus_per_worker: Annotated[float | None, Ge(0), "must be 0 or more"] = None
    """GPUs a worker; by default 1 where there are GPUs, else 0."""
    teacher_cache: str = "auto"
    """Where the frozen teacher's states are kept for all trials: auto is the run directory where that pays and fits,
    off runs the teacher at every step, anything else is a directory that sweeps can share."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to. Each trial is a run while it trains, and the decision with its figures one
    more, in a group named as the run directory."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs no login and keeps the runs in RUN_DIR/wandb, for `wandb sync`."""
    behaviour_prompts: Annotated[int, Ge(0)] = 64
    """Held-out prompts of each kind, at most, to which the baseline and the setting that would be chosen write an
    answer when all trials have ended (trials/ID/behaviour.json), and where that one breaks them the next, up to four.
    0 skips it. The whole model lies on one device then, ZeRO-3 or not."""
    judge: str = ""
    """module:function of a classifier of your own for these answers, importable from where the command runs; see
    cbtrain.evaluate --help."""
    max_degenerate_rise: Annotated[float, Ge(0)] = DEFAULT_LIMITS.degenerate_rise
    """What a recommended setting may do to what the model writes: degenerate answers to benign prompts, as observed,
    over the share before training."""
    max_degenerate_bound: Annotated[float, Ge(0)] = DEFAULT_LIMITS.degenerate_bound
    """The same by the upper bound of that share at --confidence."""
    max_benign_nll_rise: Annotated[float, Ge(0)] = DEFAULT_LIMITS.benign_nll_rise
    """Nats per token on benign text over the model before training, or half the baseline's rise if that is more."""
    max_compliance_rise: Annotated[float, Ge(0)] = DEFAULT_LIMITS.compliance_rise
    """Coherent answers to harmful prompts over the share without KL."""
    max_failures: Annotated[int, Ge(0)] = 1
    """How often a trial that raises, or whose process is killed or lost, goes on from its checkpoint on another process
    before it is failed; after memory ran out with half the micro-batch. One whose loss is not finite is not tried
    again."""
    retry_failed: bool = False
    """With --resume: run the trials that failed once more, from their checkpoints."""
    trial_timeout: Annotated[float, Ge(0), Lt(1e9), "must be 0 or more, and below 1e9"] = 0.0
    """Seconds without a logged step or evaluation after which an attempt at a trial is ended as lost; 0 waits for
    ever. Choose more than an evaluation takes."""
    profile: bool = False
    """Write where each trial's time went to trials/ID/profile.json, and print the shares at the end."""
    quiet: bool = False
    """Print nothing but the summary at the end, and errors."""
    dry_run: bool = False
    """Check everything, print the plan and what the teacher cache would take, and start nothing."""
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


HELP = Help(
    groups={
        "What is swept": (
            *("num_samples", "resume", "beta_kl_range", "kl_temperature_range", "beta_kl", "kl_temperature"),
            *("baseline_seeds", "reroute_tolerance", "confidence", "sampler", "early_stop", "calibrate", "calibration"),
            *("behaviour_prompts", "judge", "max_degenerate_rise", "max_degenerate_bound"),
            *("max_benign_nll_rise", "max_compliance_rise", "dry_run"),
        ),
        "Model": ("preset",),
        "Where it runs": (
            *("max_concurrent", "workers_per_trial", "gpus_per_worker", "teacher_cache"),
            *("max_failures", "retry_failed", "trial_timeout"),
        ),
        "Output": ("run_dir", "storage_path", "copy_to", "wandb_project", "wandb_mode", "profile", "quiet"),
    },
    first=(
        *("num_samples", "resume", "beta_kl_range", "kl_temperature_range", "reroute_tolerance", "dry_run"),
        *("harmful", "benign", "preset", "model", "steps", "lr"),
        *("max_concurrent", "workers_per_trial", "gpus_per_worker", "run_dir", "wandb_project"),
    ),
    examples=(
        "python sweeps/kl_ablation.py --num-samples 20",
        "python sweeps/kl_ablation.py --model DIR --harmful h.jsonl --benign b.jsonl",
        "python sweeps/kl_ablation.py --resume runs/latest --num-samples 40",
    ),
    instead={name: f"Searched by the sweep, and refused as a flag: give {flag(name)}-range." for name in SEARCHED},
    metavars={
        "preset": "NAME",
        "copy_to": "DIR|URI",
        "teacher_cache": "auto|off|DIR",
        "wandb_project": "NAME",
        "judge": "MODULE:FUNCTION",
    },
)
"""What `--help` and `--help-all` say beside the fields' own texts."""


def overrides_of_preset(settings: SweepSettings) -> dict[str, object]:
    """The training fields given on the command line that differ from the preset; `auto` names no model."""
    own = settings.config
    chosen = derived(own.model, own.trust_remote_code) if settings.preset == "auto" else get_config(settings.preset)
    preset = dataclasses.asdict(chosen) | ({"model": ""} if settings.preset == "auto" else {})
    given = dataclasses.asdict(own)
    overrides = {name: value for name, value in given.items() if value != preset[name]}
    return overrides


def refuse_searched(settings: SweepSettings, given: Iterable[str]) -> None:
    """Refuse a value for what the sweep searches, be it the default's.

    Args:
        given: fields whose flags are on the command line.
    """
    for name in SEARCHED:
        if name in given:
            mend = f"leave the flag out, or give {flag(name)}-range"
            raise InputError(f"{flag(name)} {getattr(settings.config, name)}: the sweep searches it; {mend}")


def check_counts(settings: SweepSettings) -> None:
    check_fields(settings, SweepSettings)
    gpus = settings.gpus_per_worker or 0.0
    if gpus > 1 and gpus != int(gpus):
        raise InputError(f"--gpus-per-worker {gpus:g}: a share of one GPU, or a whole number")
