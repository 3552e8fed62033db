"""Rows with their scored tokens marked, as one page that needs nothing else."""

from itertools import groupby
from typing import TYPE_CHECKING

import jinja2

from cbtrain.data.dataset import CircuitBreakerData
from cbtrain.data.tokenization import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 50
"""Of each side, at most."""
_PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What is scored</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 0 auto;
         padding: 1rem; }
  pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6;
        padding: .6rem; margin: .2rem 0 1rem; }
  mark { background: #bfe5c3; }
  .source { color: #555; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>What is scored</h1>
<p>Mask policy {{ policy }}. <mark>Scored tokens</mark> are rerouted on the harmful side and retained on the benign
side; the others are context.</p>
{% for side, total, rows in sides %}
<h2>{{ side }}: {{ rows | length }} of {{ "{:,}".format(total) }} rows</h2>
{% for source, stretches in rows %}
<div class="source">{{ source }}</div>
<pre>{% for scored, text in stretches -%}
{% if scored %}<mark>{{ text }}</mark>{% else %}{{ text }}{% endif %}
{%- endfor %}</pre>
{% endfor %}
{% endfor %}
</body>
</html>
""")


def html_page(data: CircuitBreakerData, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The first rows of each side, in the order of their files."""
    sides = []
    for side in ("harmful", "benign"):
        part = getattr(data, side)
        rows = sorted(part.rows, key=lambda row: row.place)
        sides.append((side, len(rows), [(row.source, _stretches(row, tokenizer)) for row in rows[:ROWS]]))
    return _PAGE.render(policy=data.mask_policy, sides=sides)


def _stretches(row: TokenRow, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[bool, str]]:
    """The row's text in stretches that are scored or not."""
    groups = groupby(range(len(row.input_ids)), key=row.scored.__getitem__)
    return [(scored, tokenizer.decode([row.input_ids[i] for i in places])) for scored, places in groups]
