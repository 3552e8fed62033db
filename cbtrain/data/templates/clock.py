"""Chat templates that ask for the time are told one date, so that a text does not change overnight."""

import datetime

import jinja2

_CLOCK = "strftime_now"
"""The function by which templates ask for the time."""
_STOPPED_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- if format not in stopped_clock -%}"
    "{{ raise_exception('it asks for the time in a format that it puts together') }}{%- endif -%}"
    "{{ stopped_clock[format] }}{%- endmacro -%}"
)


def asks_for_the_time(template: str) -> bool:
    """Whether a template has a clock."""
    return _CLOCK in template


def stopped_clock(template: str, date: datetime.date) -> tuple[str, dict[str, str]]:
    """The template with a macro of its own for its clock, since the library takes no function from us.

    Returns:
        It, and the dates by format that it must be given as `stopped_clock`.
    """
    tokens = jinja2.Environment().lex(template)
    formats = {text[1:-1] for _, kind, text in tokens if kind == "string" and "%" in text}
    return _STOPPED_CLOCK + template, {text: date.strftime(text) for text in sorted(formats)}
