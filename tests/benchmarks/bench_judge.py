"""The judge of completions against labels given by hand.

    python -m tests.benchmarks.bench_judge --model DIR --harmful F --benign F [--work DIR] [--sheet FILE]

`DIR` is SmolLM2-135M-Instruct, the rows its own. There and on the embedded default a model is trained without KL and at
a setting with it, seed 0, and they and the model before training answer held-out prompts of both kinds. Of the answers
`LABELS` keeps the SHA-256 of prompt and text, and what a reader called them who did not see which model wrote which: no
text that could harm is kept. Other machines round otherwise and write other answers here and there; those are counted
and not judged. `--sheet` writes the answers for labelling, in an order by their hash, without their models.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from cbtrain.config import CircuitBreakerConfig
    from cbtrain.evaluation.completions import Completion, View

LABELS = Path(__file__).with_name("judge_labels.jsonl")
SEED = 0
SETTINGS = {"embedded default": ((0.0, 1.0), (1.5, 3.0)), "SmolLM2": ((0.0, 1.0), (0.3, 1.0))}
"""Without KL, and where the sweep's picks lie or near."""
PROMPTS = {"embedded default": (7, 7, 0), "SmolLM2": (11, 10, 13)}
"""Harmful, benign, and harmful with `PREFILLED` tokens of the answer given; to each three models answer."""
PREFILLED = 5
NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    world: str
    model: str
    prompt: str
    text: str
    verdict: str
    reasons: tuple[str, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.prompt}\n{self.text}".encode()).hexdigest()


def main() -> None:
    """Answer, and write the sheet or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--harmful", "--benign"):
        parser.add_argument(name, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/judge"), help="where what is trained is kept")
    parser.add_argument("--sheet", type=Path, help="file to write the answers to, for labelling")
    arguments = parser.parse_args()
    answers = {each.key: each for each in answered(arguments)}
    if arguments.sheet:
        lines = [{"key": key, "prompt": answers[key].prompt, "text": answers[key].text} for key in sorted(answers)]
        arguments.sheet.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    compare(list(answers.values()), [json.loads(line) for line in LABELS.read_text().splitlines()])


def answered(arguments: argparse.Namespace) -> Iterator[Answer]:
    """All answers, with what the judge says of them."""
    from cbtrain.config import get_config
    from cbtrain.model.loading import resolve
    from cbtrain.training.loop import train

    sides = {"harmful": (arguments.harmful,), "benign": (arguments.benign,)}
    configs = {
        "embedded default": resolve(get_config("tiny")),
        "SmolLM2": replace(get_config("smollm2-135m-instruct"), model=arguments.model, **sides),
    }
    for world, settings in SETTINGS.items():
        for beta_kl, heat in settings:
            config = replace(configs[world], seed=SEED, beta_kl=beta_kl, kl_temperature=heat)
            directory = arguments.work / f"{world.split(' ')[0]}_{beta_kl:g}_{heat:g}"
            if not (directory / "adapter").is_dir():
                train(config, directory, lambda _metrics: None)
            for view, prompt, said in completed(config, directory / "adapter", PROMPTS[world]):
                model = "before" if view == "teacher" else f"{beta_kl:g} T {heat:g}"
                text, judgement = said.generated.text, said.judgement
                yield Answer(world, model, prompt, text, judgement.verdict, judgement.reasons)


def completed(
    config: "CircuitBreakerConfig", adapter_dir: Path, numbers: tuple[int, int, int]
) -> Iterator[tuple["View", str, "Completion"]]:
    """What both models answer, each with the text that it was given."""
    from cbtrain.evaluation.completions import Completer
    from cbtrain.evaluation.prompts import beyond_prefill, from_rows
    from cbtrain.evaluation.student import adapter
    from cbtrain.model.checks import prepare
    from cbtrain.model.loading import load_tokenizer
    from cbtrain.model.partial_forward import Decoder

    data, pad = prepare(config)
    harmful, benign = data.harmful.held_out, data.benign.held_out
    kinds = zip((harmful, benign, beyond_prefill(harmful, PREFILLED)), numbers, strict=True)
    prompts = [prompt for rows, number in kinds if number for prompt in from_rows(rows, number)]
    tokenizer = load_tokenizer(config)
    with adapter(config, adapter_dir) as model:
        completer = Completer(
            decoder=Decoder(model, config.hidden_states),
            config=config,
            tokenizer=tokenizer,
            pad_token_id=pad,
            max_new_tokens=NEW_TOKENS,
            classifier=None,
            teacher_said={},
            progress=lambda _done: None,
        )
        for view, answers in completer.completions(prompts, [*harmful, *benign]).items():
            for prompt, said in zip(prompts, answers, strict=True):
                yield view, tokenizer.decode(prompt.tokens), said


def compare(answers: list[Answer], labels: list[dict[str, str]]) -> None:
    """Print how far judge and labels agree, and where they do not."""
    by_key = {each.key: each for each in answers}
    pairs = [(by_key[line["key"]], line["label"]) for line in labels if line["key"] in by_key]
    print(f"{len(labels)} labels, {len(pairs)} of their answers written again on this machine\n")
    table = pd.crosstab(
        pd.Series([label for _, label in pairs], name="label"), pd.Series([a.verdict for a, _ in pairs], name="judge")
    )
    print(table.to_string(), "\n")
    for verdict in sorted({label for _, label in pairs}):
        of_class = [answer.verdict == verdict for answer, label in pairs if label == verdict]
        print(f"{verdict}: {sum(of_class)} of {len(of_class)} agree, {sum(of_class) / len(of_class):.0%}")
    signs = Counter(sign for answer, _ in pairs for sign in answer.reasons)
    print("signs of degeneration:", ", ".join(f"{sign} {number}" for sign, number in signs.most_common()))
    for answer, label in pairs:
        if answer.verdict != label:
            print(f"\n{answer.world}, {answer.model}: label {label}, judge {answer.verdict} {answer.reasons}")
            print(f"  {answer.key[:12]}")


if __name__ == "__main__":
    main()
