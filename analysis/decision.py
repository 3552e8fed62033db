"""What a decision says: the dataclasses that `analysis.decide` returns and the report shows."""

from dataclasses import dataclass, field
from typing import Any, Literal

from analysis.rules_of_thumb import RuleOfThumb
from analysis.surrogate.search_space import DEFAULT_SPACE, SearchSpace

Verdict = Literal[
    "choose",
    "no_candidate_qualifies",
    "no_setting_behaves",
    "insufficient_evidence",
    "baseline_never_rerouted",
    "baseline_failed",
]


@dataclass(frozen=True)
class Baseline:
    """The completed `beta_kl = 0` trials."""

    n_seeds: int
    """Those that did not fail; all that follows is theirs."""
    n_failed: int
    """Seeds that never rerouted although others did."""
    eval_loss_reroute: float
    """Mean over trials."""
    achieved: float
    """1 − that mean."""
    reroute_sd: float | None
    """Standard deviation of `eval_loss_reroute` between trials; None with one."""
    drift: float
    """Geometric mean of `eval_benign_kl`, nats per token."""
    drift_sd: float | None
    """Standard deviation of its logarithm between trials; None with one."""
    harmful_nll: float | None
    """Mean `eval_harmful_nll`, nats per scored prediction; None where it was not recorded."""
    base_harmful_nll: float | None
    """The same before training."""
    benign_nll_rise: float | None = None
    """Mean `eval_benign_nll` − `base_benign_nll`; None where they were not recorded."""


@dataclass(frozen=True)
class SettingAssessment:
    """What is known of one setting that was run, `beta_kl` > 0. Losses are relative to the baseline."""

    beta_kl: float
    kl_temperature: float
    n_seeds: int
    probability_feasible: float
    qualifies: bool
    """P ≥ confidence, a seed that did not fail, and no habit of failing."""
    drift: float
    """Posterior mean (of the logarithm) of `eval_benign_kl`, nats per token."""
    reroute_delta: float
    """Posterior mean of `eval_loss_reroute` minus the baseline's."""
    reroute_delta_interval: tuple[float, float]
    """Its 95 % interval, two-sided."""
    reroute_delta_bound: float
    """What it is at most with a probability of `confidence`: the bound that P speaks of."""
    pareto: bool
    """No other setting that ran has both less drift and less rerouting lost."""
    harmful_nll: float | None
    """Mean `eval_harmful_nll` over its trials."""
    behaviour_returns: bool
    """Harmful completions are likely again although the cosine looks rerouted."""
    n_failed: int = 0
    """Of its trials, those that are suspect."""
    measured: bool = False
    """Whether it was measured what its models write."""
    behaviour_reservation: str = "behaviour not measured"
    """What is not known of that; empty where enough is."""
    complaints: tuple[str, ...] = ()
    """What it does to benign text or with harmful prompts that it may not; such a setting is never picked."""


@dataclass(frozen=True)
class Suspect:
    """A completed trial that most likely failed: it has no part in the decision."""

    trial_id: str
    beta_kl: float
    kl_temperature: float
    seed: int
    metrics: tuple[str, ...]
    """`eval_loss_reroute`, `eval_benign_kl`, or both: what is not as its setting gives it."""
    probability: float
    evidence: str
    """What its setting's other seeds and its neighbours say, what it shows itself, and its log."""


@dataclass(frozen=True)
class Alternative:
    """What would be chosen under another limit or confidence; the setting is None where none would."""

    reroute_tolerance: float
    confidence: float
    beta_kl: float | None
    kl_temperature: float | None
    drift: float | None
    n_stopped: int = 0
    """Trials that were stopped early under a smaller limit than this one, and are not known under it."""


@dataclass(frozen=True)
class Needed:
    """What would suffice for an answer."""

    seeds: int
    """Seeds a setting, baseline included: 12.4 · (1 − ρ) · (σ / tolerance)²."""
    num_samples: int
    """Trials of a fresh sweep."""
    sigma: float
    """Standard deviation between seeds, in units of `eval_loss_reroute`."""
    correlation: float
    """ρ: the share of that variance which trials of one seed have in common, by the model."""
    measured: bool
    """Whether σ is the baseline seeds' own; below 3 seeds it is the model's, which rests on its prior."""


@dataclass(frozen=True)
class Decision:
    """The verdict, what it rests on, and every setting assessed. Fields about the pick are None without one."""

    verdict: Verdict
    reason: str
    """One plain sentence."""
    reroute_tolerance: float
    confidence: float
    rules_of_thumb: tuple[RuleOfThumb, ...]
    n_trials: int
    """Completed trials with finite metrics: those the decision rests on."""
    baseline: Baseline | None = None
    tolerance: float | None = None
    """The allowed rise of `eval_loss_reroute`: `reroute_tolerance` × the rerouting that the baseline achieved."""
    beta_kl: float | None = None
    kl_temperature: float | None = None
    probability_feasible: float | None = None
    eval_benign_kl: float | None = None
    """Posterior mean (of the logarithm) at the pick, nats per token."""
    drift_kept: float | None = None
    """`eval_benign_kl` as a fraction of the baseline's geometric mean."""
    drift_reduction_vs_baseline: float | None = None
    """1 − `drift_kept`."""
    reroute_delta: float | None = None
    reroute_delta_interval: tuple[float, float] | None = None
    reroute_delta_bound: float | None = None
    n_seeds: int | None = None
    n_sound_seeds: int | None = None
    """Those of them that did not fail."""
    confirmed: bool = False
    """The pick ran on at least two seeds beside its first, all pooled. Reported; no gate."""
    behaviour_warning: str = ""
    """That what the pick's models write was not measured, or on too few prompts; empty where it is as it should be."""
    range_warning: str = ""
    """That the pick sits at an end of a searched range, or what `wider` else is for; empty where that is None."""
    warnings: tuple[str, ...] = ()
    """All warnings, `range_warning` included."""
    searched: SearchSpace = DEFAULT_SPACE
    """What the sweep searched, and the map covers."""
    wider: SearchSpace | None = None
    """What a further sweep should search, where the pick sits at an end of a searched range, or no weight of a range
    that begins above the default's qualifies; else None."""
    so_far: str = ""
    """`9 of 20, 2 running` where the sweep has not ended; empty where it has."""
    needed: Needed | None = None
    mend: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration that another sweep should change, with their values; where the verdict is none."""
    suspects: tuple[Suspect, ...] = ()
    sensitivity: tuple[Alternative, ...] = ()
    """The choice at reroute tolerances of 2, 5 and 10 %, then at confidences of 0.9 and 0.99."""
    settings: tuple[SettingAssessment, ...] = ()
    """Those that qualify first, by drift; then the others, the most probable first."""

    def chose(self, beta_kl: float | None, kl_temperature: float | None) -> bool:
        """Whether this setting is the pick."""
        return self.verdict == "choose" and (beta_kl, kl_temperature) == (self.beta_kl, self.kl_temperature)
