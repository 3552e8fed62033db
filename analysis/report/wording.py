"""The decision in sentences, as terminal, decision.json and both pages have them."""

from analysis import formatting
from analysis.decision import Decision, Verdict
from analysis.formatting import count, number, percent, signed, temperature, with_relation
from analysis.verdict import nearly_chosen, pick_candidates

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


def sentence(decision: Decision) -> str:
    """The same for a page whose badge says how far the sweep is."""
    said = _headline(decision)
    return f"So far: {said.removeprefix('Use ')}" if decision.so_far else said


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
    """Why, in one or two sentences with the numbers, and what would do nearly as well."""
    near = nearly_chosen(decision) if decision.verdict == "choose" else None
    if near is None:
        return lead(decision)
    named = formatting.setting(near.beta_kl, near.kl_temperature)
    return f"{lead(decision)} {named} drifts less, {with_relation('P', near.probability_feasible)}."


def next_best(decision: Decision) -> str:
    """The setting to look at if the pick will not do, and what is known of it; empty where none was chosen."""
    if decision.verdict != "choose":
        return ""
    near = nearly_chosen(decision)
    if near is not None:
        how = f"drifts less ({number(near.drift)}), but is not sure enough"
    else:
        near = next(iter(pick_candidates(decision.settings)[1:]), None)
        if near is None:
            return "None: no other setting that ran keeps the limit."
        how = f"drifts more ({number(near.drift)})"
    named = formatting.setting(near.beta_kl, near.kl_temperature)
    return f"{named} {how}, {with_relation('P', near.probability_feasible)}, {count(near.n_seeds, 'seed')}."


def sensitivity_line(decision: Decision) -> str:
    """What other limits and confidences would choose, in one line; empty where nothing was compared."""
    limits = [each for each in decision.sensitivity if each.confidence == decision.confidence]
    others = [each for each in decision.sensitivity if each not in limits]
    said = []
    for what, rows, of in (
        ("if {} of the rerouting may be lost", limits, [percent(each.reroute_tolerance) for each in limits]),
        ("at a confidence of {}", others, [number(each.confidence) for each in others]),
    ):
        if rows:
            picks = [_named(each.beta_kl, each.kl_temperature) for each in rows]
            picks = picks[:1] if len(set(picks)) == 1 else picks
            said.append(f"{' / '.join(picks)} {what.format(' / '.join(of))}")
    stopped = max((each.n_stopped for each in limits), default=0)
    if stopped:
        said.append(f"{count(stopped, 'trial')} stopped early under the sweep's limit, not known under a larger one")
    return "; ".join(said) + "." if said else ""


def _named(beta_kl: float | None, heat: float | None) -> str:
    return "none" if beta_kl is None else f"{number(beta_kl)}, T {temperature(heat or 1)}"


def lead(decision: Decision) -> str:
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
        f"{with_relation('P', decision.probability_feasible or 0)}, {confirmed}."
    )


def _why_another(decision: Decision) -> str:
    """Why more trials of the same sweep would not do; empty where they do."""
    seeds = decision.baseline.n_seeds if decision.baseline else 0
    if decision.needed is None or decision.needed.seeds <= seeds:
        return ""
    return " That takes another sweep: a baseline gets no more seeds when its sweep is resumed."
