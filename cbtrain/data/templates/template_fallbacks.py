"""Ways to write a conversation for a chat template that cannot render all of it.

Templates differ in what they can: some refuse system turns, several calls in a turn or two turns of one role, others
leave out tool calls without a word. A form rewrites what a template might stumble over.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cbtrain.data.formats.messages import Message

CALLS_AS_TEXT = "calls_as_text"
"""Key of a message: the texts within its content that were tool calls. No template sees it."""
TOOL_RESULT = "tool_result"
"""Key of a user message that says what a tool answered, and no more. No template sees it."""

_Rewrite = Callable[[Sequence[Message]], Sequence[Message]]


@dataclass(frozen=True)
class Form:
    """A way to write a conversation."""

    changes: tuple[str, ...]
    """What it changes, in words."""
    steps: tuple[_Rewrite, ...]

    def rewrite(self, messages: Sequence[Message]) -> Sequence[Message]:
        for step in self.steps:
            messages = step(messages)
        return messages


def _as_is(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _calls_as_text(messages: Sequence[Message]) -> list[Message]:
    rewritten = []
    for message in messages:
        calls = [json.dumps(_named(call), ensure_ascii=False) for call in message.get("tool_calls", ())]
        if calls:
            lines = [message["content"], *calls] if message["content"].strip() else calls
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message |= {"content": "\n".join(lines), CALLS_AS_TEXT: calls}
        rewritten.append(message)
    return rewritten


def _named(call: Message) -> Message:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


def _tools_as_users(messages: Sequence[Message]) -> list[Message]:
    return [
        {"role": "user", "content": message["content"], TOOL_RESULT: True} if message["role"] == "tool" else message
        for message in _calls_as_text(messages)
    ]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Consecutive user turns as one, and consecutive assistant turns without calls as one."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        plain = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if last and plain and last["role"] == message["role"] and "tool_calls" not in last:
            calls = [*last.get(CALLS_AS_TEXT, ()), *message.get(CALLS_AS_TEXT, ())]
            turns[-1] = last | {"content": f"{last['content']}\n\n{message['content']}"}
            turns[-1] |= {CALLS_AS_TEXT: calls} if calls else {}
            if TOOL_RESULT not in message:
                turns[-1].pop(TOOL_RESULT, None)
        else:
            turns.append(message)
    return turns


def _system_into_user(messages: Sequence[Message]) -> list[Message]:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    for i, message in enumerate(turns):
        if message["role"] == "user":
            turns[i] = message | {"content": f"{system}\n\n{message['content']}" if system else message["content"]}
            break
    return turns


_Step = tuple[tuple[str, ...], _Rewrite]
_TOOLS: tuple[_Step, ...] = (
    ((), _as_is),
    (("tool calls as text",), _calls_as_text),
    (("tool calls as text", "tool answers as user turns"), _tools_as_users),
)
_SYSTEM: tuple[_Step, ...] = (((), _as_is), (("system turn in the user's",), _system_into_user))
_TURNS: tuple[_Step, ...] = (((), _as_is), (("turns of one role joined",), _joined))

FORMS = [
    Form(tuple(change for changes, _ in steps for change in changes), tuple(rewrite for _, rewrite in steps))
    for steps in itertools.product(_TOOLS, _SYSTEM, _TURNS)
]
"""Ways to write a row, from as it is to the plainest; the first that the template renders whole is used."""
