"""What the models write, for the page: a few prompts before training, without KL, at the pick and at the next best."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analysis.behaviour.measured import Behaviour
from analysis.decision import Decision
from analysis.formatting import setting
from analysis.verdict import pick_candidates

Kind = Literal["harmful", "harmful_prefilled", "benign"]
TITLES: dict[Kind, str] = {
    "benign": "Benign prompts",
    "harmful": "Harmful prompts",
    "harmful_prefilled": "Harmful prompts, the first tokens of the harmful answer given",
}
PROMPTS = 6
"""Shown of each kind."""
LENGTH = 200
"""Characters shown of a text."""


@dataclass(frozen=True)
class Answer:
    """One model's answer, cut to `LENGTH` characters."""

    model: str
    text: str
    verdict: str


@dataclass(frozen=True)
class Prompt:
    """One prompt and what each model answers."""

    source: str
    text: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Completions:
    """The prompts of one kind."""

    kind: Kind
    title: str
    prompts: tuple[Prompt, ...]


def load_completions(run_dir: str | Path, behaviour: Sequence[Behaviour], decision: Decision) -> list[Completions]:
    """Six prompts a kind, evenly spread over those that were answered; empty where no completions were kept.

    A file that cannot be read is left out: the figures of behaviour.json, which the decision rests on, do not need it.
    """
    models = compared(behaviour, decision)
    answered = {each.trial_id: _read(Path(run_dir), each.trial_id) for each in models}
    answered = {trial_id: rows for trial_id, rows in answered.items() if rows}
    if not answered:
        return []
    found = []
    first = next(iter(answered.values()))
    for kind, title in TITLES.items():
        keys = [key for key in first if key[0] == kind and all(key in rows for rows in answered.values())]
        chosen = [keys[i * len(keys) // PROMPTS] for i in range(PROMPTS)] if len(keys) > PROMPTS else keys
        prompts = tuple(_prompt(key, models, answered) for key in chosen)
        if prompts:
            found.append(Completions(kind, title, prompts))
    return found


def compared(behaviour: Sequence[Behaviour], decision: Decision) -> list[Behaviour]:
    """Of the measured trials one without KL, one of the pick, and one of the first other setting."""
    trials = [each for each in behaviour if each.trial_id]
    pick = (decision.beta_kl, decision.kl_temperature)
    baseline = [each for each in trials if each.beta_kl == 0]
    of_pick = [each for each in trials if each.beta_kl and (each.beta_kl, each.kl_temperature) == pick]
    ranked = [(each.beta_kl, each.kl_temperature) for each in (*pick_candidates(decision.settings), *decision.settings)]
    others = [each for each in trials if each.beta_kl and each not in of_pick]
    others.sort(key=lambda each: _place(ranked, each))
    return [*baseline[:1], *of_pick[:1], *others[:1]]


def _place(ranked: Sequence[tuple[float, float]], each: Behaviour) -> int:
    setting = (each.beta_kl, each.kl_temperature)
    return ranked.index(setting) if setting in ranked else len(ranked)  # type: ignore[arg-type]


def next_best_measured(behaviour: Sequence[Behaviour], decision: Decision) -> bool:
    """Whether the setting that comes after the pick was measured; true where there is none."""
    measured = {(each.beta_kl, each.kl_temperature) for each in behaviour if each.trial_id}
    return all((each.beta_kl, each.kl_temperature) in measured for each in pick_candidates(decision.settings)[1:2])


def _read(run_dir: Path, trial_id: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers of one trial's completions.jsonl by kind and source; lines that are damaged are left out."""
    try:
        text = (run_dir / "trials" / trial_id / "completions.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {(row["kind"], row["source"]): row for row in _rows(text)}


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            row = json.loads(line)
            texts = row["kind"], row["source"], row["prompt"], row["teacher"]["text"], row["student"]["text"]
        except (ValueError, KeyError, TypeError):
            continue
        if all(isinstance(each, str) for each in texts):
            yield row


def _prompt(
    key: tuple[str, str], models: Sequence[Behaviour], answered: dict[str, dict[tuple[str, str], dict[str, Any]]]
) -> Prompt:
    rows = [(each, answered[each.trial_id][key]) for each in models if each.trial_id in answered]
    before = rows[0][1]["teacher"]
    answers = [Answer("before training", cut(before["text"]), str(before.get("verdict", "")))]
    for each, row in rows:
        name = setting(each.beta_kl, each.kl_temperature)
        answers.append(Answer(name, cut(row["student"]["text"]), str(row["student"].get("verdict", ""))))
    return Prompt(key[1], cut(rows[0][1]["prompt"], of_end=True), tuple(answers))


def cut(text: str, *, of_end: bool = False) -> str:
    """At most `LENGTH` characters, the last ones of a prompt, whose template comes first."""
    if len(text) <= LENGTH:
        return text
    return f"… {text[-LENGTH:]}" if of_end else f"{text[:LENGTH]} …"
