"""Draw records with plotly.

Modules:
    cells: Draw the drops of one cell, its proxies, its margins and the documents lost.
    headline: Draw the first chart of the page.
    maps: Draw heat maps.
    model: Draw the relevance and proxies of models over depth.
    style: Define colours, axes, traces and hover boxes that charts share.
"""
