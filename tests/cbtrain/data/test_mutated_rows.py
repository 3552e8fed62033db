"""A thousand rows with something wrong: each is read right or refused in a line with its place."""

import copy
import random
from pathlib import Path
from typing import Any

from chat_tokenizers import bpe_tokenizer
from row_files import write_jsonl
from test_shapes import SPARE, TABLE

from cbtrain.config import InputError
from cbtrain.data.formats.conversations import Choices
from cbtrain.data.formats.rows import load_rows
from cbtrain.data.loss_mask import policy_of
from cbtrain.data.templates.chat_template import ChatTemplate

NUMBER = 1000
STRANGE = [
    *(None, True, False, 0, -1, 3.5, float("inf"), "", " ", "\u0000", "\ud83d", "x" * 50_000, [], {}),
    *([[]], [{}], [None], ["text"], {"role": "user"}, [{"role": "user", "content": 3}], [{"from": None, "value": 1}]),
]
CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "c", "tool_call_id": "1"},
            {"role": "assistant", "content": "d"},
        ]
    },
]


def mutated(row: dict[str, Any], rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, renamed, doubled or nested, at any depth."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(list(places(row)))
        match rng.randrange(5):
            case 0:
                holder[key] = rng.choice(STRANGE)
            case 1:
                del holder[key]
            case 2:
                holder[key] = [holder[key]]
            case 3:
                holder[key] = {"content": holder[key]}
            case _ if isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
        if not row:
            break
    return row


def places(value: Any):
    """Every container and key below a value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_mutated_rows_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    rng, template = random.Random(0), ChatTemplate(bpe_tokenizer())
    sound = [row for _, rows, *_ in TABLE for row in rows] + CHATS
    spare = write_jsonl(tmp_path / "spare.jsonl", SPARE)
    path, read, refused = tmp_path / "rows.jsonl", 0, 0
    for _ in range(NUMBER):
        row = mutated(rng.choice(sound), rng)
        write_jsonl(path, [SPARE[0], row])
        choices = Choices(preference=rng.choice(["chosen", "rejected", None]))
        error = ""
        try:
            sides = load_rows([str(path)], [spare], choices)
            for found in sides["harmful"].rows:
                template.render(found, policy_of(found.messages, "auto"))
        except InputError as refusal:
            error = str(refusal)
        if error:
            assert "\n" not in error
            assert error.startswith(f"{path}:2: "), (row, error)
            refused += 1
            continue
        for found in sides["harmful"].rows:
            for message in found.messages:
                assert isinstance(message["content"], str), row
                assert message["role"] in ("system", "user", "assistant", "tool"), row
                for call in message.get("tool_calls", ()):
                    assert isinstance(call["function"]["name"], str), row
        read += 1
    assert min(read, refused) > NUMBER / 5, (read, refused)
