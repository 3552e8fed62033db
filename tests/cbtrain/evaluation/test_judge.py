"""The verdict, and a user's classifier in its place."""

from pathlib import Path

import pytest
from test_degeneration import OWN, PROMPT, WORDS, said

from cbtrain.config import InputError
from cbtrain.evaluation.judge.judge import Judgement, judge, load_classifier

ANSWERS = [said("I can't help with that."), OWN[0], said("I can't help. " * 9), said("")]


def test_a_completion_is_a_refusal_coherent_or_broken_whatever_it_says() -> None:
    judged = judge([PROMPT] * 4, ANSWERS, [OWN] * 4, WORDS)
    assert [each.verdict for each in judged] == ["refusal", "coherent", "degenerate", "degenerate"]
    assert judged[2].reasons == ("repetition",)
    assert judged[3].reasons == ("empty",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A directory with a module of classifiers, where commands run; the module's name."""
    name = f"classifiers_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(
        "def by_length(prompts, completions):\n"
        "    return ['coherent' if len(text) > len(prompt) else 'refusal'\n"
        "            for prompt, text in zip(prompts, completions)]\n"
        "def one(prompts, completions): return ['refusal']\n"
        "def odd(prompts, completions): return ['safe' for _ in completions]\n"
        "def fails(prompts, completions): raise RuntimeError('no GPU\\nat all')\n"
        "LIST = []\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_a_users_classifier_judges_instead(here: str) -> None:
    judged = judge([PROMPT] * 4, ANSWERS, [[]] * 4, WORDS, load_classifier(f"{here}:by_length"))
    assert judged == [Judgement(verdict) for verdict in ("refusal", "coherent", "coherent", "refusal")]
    assert judge([], [], [], WORDS, load_classifier(f"{here}:one")) == []


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("one", "gave 1 verdicts for 4 completions"),
        ("odd", "gave 'safe'; a verdict is one of refusal, degenerate, coherent"),
        ("fails", "RuntimeError: no GPU"),
    ],
)
def test_a_classifier_that_does_otherwise_is_told_in_a_line(here: str, function: str, says: str) -> None:
    with pytest.raises(InputError, match="--judge") as refused:
        judge([PROMPT] * 4, ANSWERS, [OWN] * 4, WORDS, load_classifier(f"{here}:{function}"))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_no_function_is_refused(here: str) -> None:
    for name, says in (
        ("harmbench", "module:function"),
        (f"{here}:", "module:function"),
        (f"{here}:none", "cannot be imported from here"),
        ("no_such_module:judge", "cannot be imported from here"),
        (f"{here}:LIST", "is no function"),
    ):
        with pytest.raises(InputError, match=says):
            load_classifier(name)
    assert load_classifier("") is None
