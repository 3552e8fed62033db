"""The decision in sentences, as terminal, decision.json and both pages have them."""

from analysis import formatting
from analysis.decision import Decision, Verdict
from analysis.formatting import count, number, percent, signed, temperature, with_relation
from analysis.verdict import nearly_chosen

_HEADLINES: dict[Verdict, str] = {
    "no_candidate_qualifies": "Use beta_kl = 0: no KL weight of {searched} keeps rerouting within the limit.",
    "no_setting_behaves": "Ship none of these: the settings that keep rerouting within the limit break behaviour.",
    "insufficient_evidence": "Not enough evidence to choose beta_kl.",
    "baseline_never_rerouted": "Cannot choose beta_kl: the baseline never rerouted.",
    "baseline_failed": "Cannot choose beta_kl: no baseline trial completed.",
}


def headline(decision: Decision) -> str:
    """The first line: what to use, or that nothing can be said, and what is not known of it."""
    said = _headline(decision)
    return f"So far ({decision.so_far}): {said}" if decision.so_far else said


def _headline(decision: Decision) -> str:
    if decision.verdict == "baseline_never_rerouted" and decision.baseline and decision.baseline.n_failed:
        return "Cannot choose beta_kl: the baseline does not reroute at every seed."
    if decision.verdict != "choose":
        return _HEADLINES[decision.verdict].format(searched=decision.searched.range_of("beta_kl"))
    beta_kl, heat = number(decision.beta_kl or 0), temperature(decision.kl_temperature or 1)
    reservations = ["on one seed"] if decision.n_sound_seeds == 1 else []
    reservations += [decision.behaviour_warning] if decision.behaviour_warning else []
    if (decision.drift_kept or 0) >= 1:
        reservations.append("benign drift is no less than at beta_kl = 0")
    but = f", but {' and '.join(reservations)}" if reservations else ""
    return f"Use beta_kl = {beta_kl} at kl_temperature = {heat}{but}."


def suspect_lines(decision: Decision) -> list[str]:
    """A line for each trial that most likely failed: `t018, seed 1, beta_kl 0.5, T 2.0: …`."""
    return [
        f"{each.trial_id}, seed {each.seed}, {formatting.setting(each.beta_kl, each.kl_temperature)}: {each.evidence}"
        for each in decision.suspects
    ]


def explanation(decision: Decision) -> str:
    """Why, in one or two sentences with the numbers."""
    if decision.verdict == "baseline_never_rerouted" and not decision.mend:
        # Not alpha: it scales all terms alike, to which AdamW is indifferent.
        return f"{decision.reason} Give rerouting more room: more --steps, a higher --lr, a larger --schedule-horizon."
    if decision.verdict == "insufficient_evidence" and decision.needed is not None:
        needed = decision.needed
        noise = f"σ {number(needed.sigma, 2)}{'' if needed.measured else ' assumed'}"
        return (
            f"{decision.reason} About {count(needed.seeds, 'seed')} of baseline and setting would suffice "
            f"({noise}, paired correlation {number(needed.correlation, 2)}).{_why_another(decision)}"
        )
    if decision.verdict != "choose":
        return decision.reason
    pick = next(
        s for s in decision.settings if (s.beta_kl, s.kl_temperature) == (decision.beta_kl, decision.kl_temperature)
    )
    seeds = count(pick.n_seeds, "seed") + (f" of which {pick.n_failed} failed" if pick.n_failed else "")
    confirmed = seeds if decision.confirmed else f"{seeds}, not yet confirmed"
    return (
        f"Benign drift is {number(decision.eval_benign_kl or 0)} nats/token, {percent(decision.drift_kept or 0)} of "
        f"what it is without KL, and rerouting stays within the limit: {percent(decision.confidence)} sure that it "
        f"loses at most {signed(decision.reroute_delta_bound or 0)} of {number(decision.tolerance or 0, 2)} allowed, "
        f"{with_relation('P', decision.probability_feasible or 0)}, {confirmed}.{_cheaper(decision)}"
    )


def _cheaper(decision: Decision) -> str:
    near = nearly_chosen(decision)
    if near is None:
        return ""
    named = formatting.setting(near.beta_kl, near.kl_temperature)
    return f" {named} drifts less, {with_relation('P', near.probability_feasible)}."


def _why_another(decision: Decision) -> str:
    """Why more trials of the same sweep would not do; empty where they do."""
    seeds = decision.baseline.n_seeds if decision.baseline else 0
    if decision.needed is None or decision.needed.seeds <= seeds:
        return ""
    return " That takes another sweep: a baseline gets no more seeds when its sweep is resumed."
