"""The report's figures. Each is two functions: `prepare_…` makes typed data of a sweep, `draw_…` draws them.

Matplotlib draws them as SVG without dates and with fixed ids, so that the same sweep gives the same bytes, and as PNG
for places that take no SVG. A plotting script in the page would let points tell their numbers on hover, but who allows
no script, prints, or uses a screen reader would see less than others; a table below each figure tells all of them.
"""
