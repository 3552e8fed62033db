"""The decision in sentences, as terminal, decision.json and both pages have them."""

from analysis import formatting
from analysis.constraint import probably_feasible
from analysis.decision import Alternative, Decision, SettingAssessment, Verdict
from analysis.formatting import count, number, percent, signed, temperature, with_relation
from analysis.verdict import nearly_chosen, pick_candidates

_HEADLINES: dict[Verdict, str] = {
    "no_candidate_qualifies": "Use beta_kl = 0: no KL weight qualifies, all from {low:g} to {high:g} lose too much.",
    "no_setting_behaves": "Ship none of these: the settings that keep rerouting within the limit break behaviour.",
    "insufficient_evidence": "Not enough evidence to choose beta_kl.",
    "baseline_never_rerouted": "Cannot choose beta_kl: the baseline never rerouted.",
    "baseline_failed": "Cannot choose beta_kl: no baseline trial completed.",
}


PROMISING = 0.8
"""P from which a setting is worth more seeds."""
GOOD = 0.8
"""Share of rerouting from which a baseline is called good."""


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
        low, high = decision.searched.beta_kl
        return _HEADLINES[decision.verdict].format(low=low, high=high)
    beta_kl, heat = number(decision.beta_kl or 0), temperature(decision.kl_temperature or 1)
    reservations = ["on one seed"] if decision.n_sound_seeds == 1 else []
    failed = (decision.n_seeds or 0) - (decision.n_sound_seeds or 0)
    reservations += [f"{failed} of its {decision.n_seeds} seeds failed"] if failed else []
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


def less_drift(decision: Decision) -> str:
    """Why no setting that drifts less was chosen, by the one of them that comes nearest; empty without a pick."""
    if decision.verdict != "choose" or decision.eval_benign_kl is None:
        return ""
    less = [each for each in decision.settings if each.drift < decision.eval_benign_kl]
    if not less:
        return "No setting that ran drifts less."
    near = nearly_chosen(decision) or max(less, key=lambda each: (each.qualifies, each.probability_feasible))
    named = formatting.setting(near.beta_kl, near.kl_temperature)
    return f"{named} ({number(near.drift)}) {against(near, decision)}."


def against(each: SettingAssessment, decision: Decision) -> str:
    """What speaks against a setting, in a few words."""
    chance = with_relation("P", each.probability_feasible)
    if each.complaints:
        return "breaks what it writes"
    if each.qualifies:
        return "is kept out by what others like it write"
    if each.n_failed:
        return f"failed at {each.n_failed} of {count(each.n_seeds, 'seed')}"
    if probably_feasible(1 - each.probability_feasible, decision.confidence):
        return f"loses too much rerouting, {chance} of keeping the limit"
    if each.probability_feasible < 0.5:
        return f"most likely loses too much rerouting, {chance} of keeping the limit"
    return f"is not sure enough to keep the limit, {chance}"


def check_after(decision: Decision) -> str:
    """What to look at after training a setting of which a seed failed; empty where none did."""
    if decision.verdict != "choose" or decision.baseline is None or decision.n_sound_seeds == decision.n_seeds:
        return ""
    most = decision.baseline.eval_loss_reroute + (decision.tolerance or 0)
    return f"A run of the pick may fail too: after training, eval_loss_reroute should be at most {number(most, 2)}."


def next_best(decision: Decision) -> str:
    """The setting to take if the pick will not do; of a sweep without a pick the one that is worth more seeds."""
    if decision.verdict == "insufficient_evidence":
        worth = [each for each in decision.settings if each.probability_feasible >= PROMISING and not each.complaints]
        best = min(worth, key=lambda each: each.drift, default=None)
        return "" if best is None else f"{_described(best)}."
    if decision.verdict != "choose":
        return ""
    following = next(iter(pick_candidates(decision.settings)[1:]), None)
    if following is not None:
        return f"{_described(following)}."
    broken = sum(each.qualifies and bool(each.complaints) for each in decision.settings)
    if broken:
        return f"none; {count(broken, 'other')} kept the limit, but broke benign text or brought harmful answers back."
    return "none that ran keeps the limit."


def _described(each: SettingAssessment) -> str:
    named = formatting.setting(each.beta_kl, each.kl_temperature)
    chance = with_relation("P", each.probability_feasible)
    return f"{named}, drift {number(each.drift)}, {chance}, {count(each.n_seeds, 'seed')}"


def sensitivity_line(decision: Decision) -> str:
    """What other limits and confidences would choose, in one line; empty where nothing was compared."""
    now = next((a for a in decision.sensitivity if _is_asked(a, decision)), None)
    said = []
    for each in decision.sensitivity:
        if each is now or (now is None and _is_asked(each, decision)):
            continue
        of_limit = each.confidence == decision.confidence
        what = f"if {percent(each.reroute_tolerance)} may be lost" if of_limit else f"at P ≥ {number(each.confidence)}"
        same = (
            now is not None
            and now.beta_kl is not None
            and (each.beta_kl, each.kl_temperature) == (now.beta_kl, now.kl_temperature)
        )
        said.append(f"{what}: {'the same' if same else _named(each.beta_kl, each.kl_temperature)}")
    stopped = max((each.n_stopped for each in decision.sensitivity), default=0)
    if stopped:
        said.append(f"{count(stopped, 'trial')} stopped early under the sweep's limit, not known under a larger one")
    line = "; ".join(said)
    return f"{line[0].upper()}{line[1:]}." if line else ""


def _is_asked(each: Alternative, decision: Decision) -> bool:
    return (each.reroute_tolerance, each.confidence) == (decision.reroute_tolerance, decision.confidence)


def _named(beta_kl: float | None, heat: float | None) -> str:
    return "none" if beta_kl is None else f"{number(beta_kl)}, T {temperature(heat or 1)}"


def rule(decision: Decision) -> str:
    """What the limit is and what P speaks of; empty where no baseline gives one."""
    if decision.baseline is None or decision.tolerance is None:
        return ""
    return (
        f"The limit: held-out loss_reroute (0 turned away, 1 untouched) may rise by {number(decision.tolerance, 2)}, "
        f"{percent(decision.reroute_tolerance)} of what the baseline (beta_kl = 0) achieved. P is the probability that "
        f"a setting keeps it on average over seeds that do not fail; {number(decision.confidence)} is asked for. A "
        f"setting whose answers break, or that brings harmful ones back, is passed over."
    )


def baseline_answer(decision: Decision) -> str:
    """Whether the baseline was any good, in a sentence."""
    baseline = decision.baseline
    if baseline is None:
        return "Not known yet: none has ended." if decision.so_far else f"No. {decision.reason}"
    seeds = f"{count(baseline.n_seeds, 'seed')} rerouted {percent(baseline.achieved)} of held-out harmful text"
    if decision.verdict == "baseline_never_rerouted":
        return f"{'Not so far' if decision.so_far else 'No'}: {seeds}."
    failed = f"; {count(baseline.n_failed, 'more seed')} failed" if baseline.n_failed else ""
    kept = "" if baseline.benign_nll_rise is None else f", benign NLL rose by {number(baseline.benign_nll_rise, 2)}"
    return f"{'Mostly' if failed or baseline.achieved < GOOD else 'Yes'}: {seeds}{kept}{failed}."


def lead(decision: Decision) -> str:
    """Why, in one or two sentences with the numbers."""
    if decision.verdict == "baseline_never_rerouted" and not decision.mend:
        # Not alpha: it scales all terms alike, to which AdamW is indifferent.
        return f"{decision.reason} Give rerouting more room: more --steps, a higher --lr, a larger --schedule-horizon."
    if decision.verdict == "insufficient_evidence" and decision.needed is not None:
        needed = decision.needed
        noise = f"σ {number(needed.sigma, 2)}{'' if needed.measured else ' assumed'}"
        return (
            f"{decision.reason} About {count(needed.seeds, 'seed')} in all of baseline and setting would suffice "
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
        f"{with_relation('P(within the limit)', decision.probability_feasible or 0)}, {confirmed}."
    )


def _why_another(decision: Decision) -> str:
    """Why more trials of the same sweep would not do; empty where they do."""
    seeds = decision.baseline.n_seeds if decision.baseline else 0
    if decision.needed is None or decision.needed.seeds <= seeds or decision.so_far:
        return ""
    return " That takes another sweep: a baseline gets no more seeds when its sweep is resumed."
