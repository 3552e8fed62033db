"""Messages in the dialects of data sets and APIs to one form: role, text, tool calls."""

import json
from collections import Counter
from typing import Any

from cbtrain.config import InputError

Message = dict[str, Any]
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "model", "function_call", "function-call"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function-response"), "tool"),
}
"""What a role is called here, by its name in lower case; ShareGPT's `function_call` is an assistant turn that calls."""
READ = ("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name")
"""Fields of a message that are read."""
_ARGUMENTS = ("arguments", "args", "parameters", "input")
"""What the arguments of a call are called: by OpenAI, AgentDojo and LangChain, Llama 3, Anthropic."""
_OF_A_CALL = {"name", "id", "type", "index", "function", "cache_control", "placeholder_args", "caller"}
MEDIA = ("image", "audio", "video", "file", "document")
"""Kinds of parts that text cannot carry; also `image_url`, `input_image` and the like."""
_PLACEHOLDERS = tuple(f"<{kind}>" for kind in MEDIA)


def messages_of(values: object, where: str, odd: Counter[str], name: str = "messages") -> list[Message]:
    """A conversation's messages: `content` is always a string, `tool_calls` is there only where there are some.

    Args:
        values: a list of messages, `role` and `content` or ShareGPT's `from` and `value`.
        where: the row's place.
        name: of the field that holds them.
        odd: counts, of this conversation, what text cannot carry.

    Raises:
        InputError: it is no list with at least one message, or one is of no known form.
    """
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: {name} must be a list with at least one message")
    return [turn for i, value in enumerate(values, 1) for turn in _message(value, f"{where}: message {i}", odd)]


def text_of(value: object, where: str) -> str:
    """A field that must be text; null is nothing said.

    Raises:
        InputError: it is none, or several, which joined would be no text that anyone wrote.
    """
    if isinstance(value, list) and sum(isinstance(part, str) for part in value) > 1:
        raise InputError(f"{where} holds {len(value)} texts; a row has one (a file of columns is no file of rows)")
    return _content(value, where, Counter())[0]


def role_of(message: Message) -> str | None:
    """What a message's role is called here; None where it has none that is known."""
    return ROLES.get(_named_role(message))


def _named_role(message: Message) -> str:
    return str(message.get("role", message.get("from"))).strip().casefold()


def is_parts(value: object) -> bool:
    """Whether a field holds the parts of a message, which may be more than text."""
    return isinstance(value, list) and any(isinstance(part, dict) for part in value)


def _message(value: object, where: str, odd: Counter[str]) -> list[Message]:
    """One message, after the tool results that it carries as parts."""
    role = role_of(value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or role is None:
        known = "system, user, assistant, tool, or another name of these"
        raise InputError(f"{where}: must be an object whose role is one of {known}")
    written = next((value[name] for name in ("content", "value") if value.get(name) is not None), None)
    calling = value.get("tool_calls") or _named_call(value.get("function_call"))
    if not calling and not {"content", "value", "refusal"} & value.keys() and role != "tool":
        others = ", ".join(sorted(value.keys() - {"role", "from"})) or "none"
        raise InputError(f"{where}: has no content (fields: {others[:60]})")
    if _named_role(value) in ("function_call", "function-call"):
        return [{"role": role, "content": "", "tool_calls": _tool_calls(_parsed(written), f"{where}: value")}]
    content, calls, results = _content(written, f"{where}: content", odd)
    message: Message = {"role": role, "content": content}
    # Templates test for the key: an empty list of calls would be rendered as a call. OpenAI's first form had one call.
    if calling:
        calls = [*calls, *_tool_calls(calling, f"{where}: tool_calls")]
    if calls:
        message["tool_calls"] = calls
    message |= {key: value[key] for key in ("tool_call_id", "name") if isinstance(value.get(key), str)}
    return results if results and not content and not calls else [*results, message]


def _content(value: object, where: str, odd: Counter[str]) -> tuple[str, list[Message], list[Message]]:
    """Text of a message, the calls and the tool results among its parts."""
    if value is None:
        return "", [], []
    if isinstance(value, str):
        return value, [], []
    if not isinstance(value, list):
        raise InputError(f"{where} must be a string, null or a list of text parts, this is {kind_of(value)}")
    texts, calls, results = list[str](), list[Message](), list[Message]()
    for part in value:
        kind = str(part.get("type", "")) if isinstance(part, dict) else ""
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            raise InputError(f"{where}: a part must be an object with text, this is {kind_of(part)}")
        elif kind in ("tool_use", "tool_call", "function_call"):
            calls += _tool_calls([part], f"{where}: {kind}")
        elif kind == "tool_result":
            told = _content(part.get("content"), f"{where}: tool_result", odd)[0]
            identity = {"tool_call_id": part["tool_use_id"]} if isinstance(part.get("tool_use_id"), str) else {}
            results.append({"role": "tool", "content": told, **identity})
        elif (text := _text(part)) is not None:
            texts.append(text)
        elif medium := next((m for m in MEDIA if m in kind or any(m in key for key in part)), None):
            odd[medium] += 1
        elif kind in ("thinking", "redacted_thinking", "reasoning"):
            odd["thinking"] += 1
        else:
            raise InputError(f"{where}: a part must have text, this is one of type {kind or 'unknown'}")
    return "".join(texts), calls, results


def _text(part: dict[str, Any]) -> str | None:
    """The text of a part, under any of the names that it goes by."""
    if (part.get("type") or "text") not in ("text", "input_text", "output_text", "refusal"):
        return None
    names = ("text", "content", "value", "refusal")
    return next((part[name] for name in names if isinstance(part.get(name), str)), None)


def without_placeholders(messages: list[Message], odd: Counter[str]) -> list[Message]:
    """The messages of a row that has media beside its text, where `<image>` stands for one; they are counted."""
    kept = []
    for message in messages:
        content = message["content"]
        for placeholder in _PLACEHOLDERS:
            if placeholder in content:
                odd[placeholder[1:-1]] += content.count(placeholder)
            content = content.replace(f"{placeholder}\n", "").replace(placeholder, "")
        kept.append(message | {"content": content})
    return kept


def _named_call(value: object) -> object:
    """OpenAI's first form of a call; a column of structs has one without a name where a row has none."""
    return None if isinstance(value, dict) and value.get("name") is None else value


def _tool_calls(value: object, where: str) -> list[Message]:
    """Calls in the forms of OpenAI, Anthropic, AgentDojo, LangChain and Llama 3."""
    calls: list[Message] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(call, dict) and isinstance(function, str):
            function = {**call, "name": function}
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where} must be a list of objects with function.name and function.arguments")
        given = next((function[name] for name in _ARGUMENTS if function.get(name) is not None), None)
        strange = sorted(name for name in function.keys() - _OF_A_CALL - {*_ARGUMENTS} if function[name] is not None)
        if given is None and strange:
            raise InputError(f"{where}: {function['name']} has no arguments (fields: {', '.join(strange)[:60]})")
        called = {"name": function["name"], "arguments": _arguments(given)}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(identity | {"type": "function", "function": called})
    return calls


def _arguments(value: object) -> object:
    """Arguments as an object: chat templates expect one, while OpenAI's format writes it as a string."""
    if value is None:
        return {}
    parsed = _parsed(value)
    return parsed if isinstance(parsed, dict) else value


def _parsed(value: object) -> object:
    """What a string holds as JSON; itself where it holds none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError, ValueError):
        return value


def kind_of(value: object) -> str:
    """A JSON value's kind, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def unread_of_messages(row: dict[str, Any]) -> set[str]:
    """What a conversation says in fields that are not read."""
    turns = [turn for name in ("messages", "conversations") for turn in _list(row.get(name)) if isinstance(turn, dict)]
    told = {
        f"{name} of assistant turns"
        for turn in turns
        for name in turn
        if role_of(turn) == "assistant" and name not in READ and turn[name] not in (None, "", [], {}, False)
    }
    return told | ({"tools"} if row.get("tools") else set())


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
