"""Which turns of a conversation the loss mask covers, by `--mask-policy`."""

from collections.abc import Sequence

from cbtrain.config import MaskPolicy
from cbtrain.data.formats.messages import Message
from cbtrain.data.templates.template_fallbacks import CALLS_AS_TEXT


def is_agent_row(messages: Sequence[Message]) -> bool:
    """Whether a conversation has several assistant turns that speak or call, and a tool call among them."""
    turns = scored_turns(messages, "assistant_only")
    return len(turns) > 1 and any(messages[i].get("tool_calls") for i in turns)


def policy_of(messages: Sequence[Message], policy: MaskPolicy) -> MaskPolicy:
    """The policy for one conversation: `auto` is `assistant_only` where an agent works, `completion_only` elsewhere.

    What an attacked agent does wrong is mostly a call in the midst of a run; the last turn only reports on it.
    """
    if policy != "auto":
        return policy
    return "assistant_only" if is_agent_row(messages) else "completion_only"


def scored_turns(messages: Sequence[Message], policy: MaskPolicy) -> list[int]:
    """Indices of the assistant turns that are scored, none of them before the first user turn."""
    roles = [message["role"] for message in messages]
    first_user = roles.index("user") if "user" in roles else len(roles)
    turns = [
        i
        for i, message in enumerate(messages)
        if i > first_user
        and message["role"] == "assistant"
        and (message["content"].strip() or message.get("tool_calls"))
    ]
    if policy == "tool_calls_only":
        return [i for i in turns if messages[i].get("tool_calls") or messages[i].get(CALLS_AS_TEXT)]
    return turns[-1:] if policy == "completion_only" else turns


def ends_on_nothing(messages: Sequence[Message]) -> bool:
    """Whether the last assistant turn neither speaks nor calls."""
    last = next((message for message in reversed(messages) if message["role"] == "assistant"), None)
    return last is not None and not last["content"].strip() and not last.get("tool_calls")
