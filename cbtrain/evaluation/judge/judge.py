"""The verdict on a completion: refusal, degenerate or coherent; by this package's own signs or by a user's classifier.

A user's is any function `judge(prompts, completions) -> verdicts`, three lists of strings of one length, named
`module:function` and importable from where the command runs.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast, get_args

from cbtrain.evaluation.judge.degeneration import Generated, Words, reasons
from cbtrain.evaluation.judge.refusals import refuses
from cbtrain.utils.errors import InputError, first_line

Verdict = Literal["refusal", "degenerate", "coherent"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
JudgeFunction = Callable[[list[str], list[str]], Sequence[str]]


class Judgement(NamedTuple):
    """What a completion is, and if degenerate by which signs (none from a user's classifier)."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()


def judge(
    prompts: Sequence[str],
    answers: Sequence[Generated],
    own: Sequence[Sequence[Generated]],
    words: Words,
    classifier: JudgeFunction | None = None,
) -> list[Judgement]:
    """Judge each completion; one that is broken is degenerate even where it declines.

    Args:
        prompts: the text of each prompt.
        answers: a completion of each.
        own: to each prompt other answers of the model before training, at least one; not used with `classifier`.
        classifier: a user's; None judges by this package's signs.

    Raises:
        InputError: the classifier fails, or gives other than a verdict for each completion.
    """
    if classifier is not None:
        return _classified(classifier, list(prompts), [answer.text for answer in answers])
    judgements = []
    for prompt, answer, usual in zip(prompts, answers, own, strict=True):
        if signs := reasons(answer, usual, prompt, words):
            judgements.append(Judgement("degenerate", signs))
        else:
            judgements.append(Judgement("refusal" if refuses(answer.text) else "coherent"))
    return judgements


def load_classifier(name: str) -> JudgeFunction | None:
    """The function that `--judge module:function` names; None for an empty name.

    Raises:
        InputError: there is none of that name.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"--judge {name}: must be module:function, such as my_judges:harmbench")
    if os.getcwd() not in sys.path:  # a script's own directory stands there in its place
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a user's module raises
        raise InputError(f"--judge {name}: cannot be imported from here ({first_line(error)})") from error
    if not callable(found):
        raise InputError(f"--judge {name}: is no function")
    return cast(JudgeFunction, found)


def _classified(classifier: JudgeFunction, prompts: list[str], completions: list[str]) -> list[Judgement]:
    if not prompts:
        return []
    try:
        verdicts = list(classifier(prompts, completions))
    except Exception as error:  # whatever a user's function raises
        raise InputError(f"--judge: the function failed ({type(error).__name__}: {first_line(error)})") from error
    if len(verdicts) != len(completions):
        raise InputError(f"--judge: the function gave {len(verdicts)} verdicts for {len(completions)} completions")
    if strange := [verdict for verdict in verdicts if verdict not in VERDICTS]:
        raise InputError(f"--judge: the function gave {strange[0]!r}; a verdict is one of {', '.join(VERDICTS)}")
    return [Judgement(cast(Verdict, verdict)) for verdict in verdicts]
