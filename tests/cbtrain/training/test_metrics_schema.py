"""The table of metrics.jsonl in cbtrain/README.md against what a run writes."""

import json
import re
from pathlib import Path

from cbtrain.evaluation.convergence import convergence_metrics
from cbtrain.training.loop import train

README = Path(__file__).parents[3] / "cbtrain" / "README.md"


def documented() -> dict[str, str]:
    """When a key is written, by key: `every line`, `evaluation` or `last line`."""
    table = README.read_text().split("| key | unit | when |\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    keys = [(key, when.split(",")[0]) for names, _, when in rows for key in re.findall(r"`([^`]+)`", names)]
    assert len(dict(keys)) == len(keys), keys
    return dict(keys)


def written(line: dict[str, float]) -> set[str]:
    return {re.sub(r"layer_\d+", "layer_K", key) for key in line}


def test_the_schema_of_metrics_names_every_key_that_is_written_and_when(small_config, tmp_path: Path) -> None:
    train(small_config, tmp_path, lambda _metrics: None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    by_time = {when: {key for key, said in documented().items() if said == when} for when in set(documented().values())}
    assert set(by_time) == {"every line", "evaluation", "last line"}
    for line in lines[:-1]:
        evaluated = line["step"] % small_config.eval_every == 0
        expected = by_time["every line"] | (by_time["evaluation"] if evaluated else set())
        assert written(line) == expected, written(line) ^ expected
    assert written(lines[-1]) - by_time["last line"] == by_time["every line"] | by_time["evaluation"]
    assert all(isinstance(value, int | float) for line in lines for value in line.values())


def test_the_schema_names_what_the_last_line_says_of_convergence() -> None:
    layers = {"eval_cosine_layer_2": 0.0, "eval_cosine_layer_3": 0.0}
    curve = [{"step": step, "loss_reroute": 0.1, "eval_loss_reroute": 0.1, **layers} for step in range(1, 41)]
    found = written(convergence_metrics(curve, (2, 3), 0.05))
    assert found == {key for key, when in documented().items() if when == "last line"}
