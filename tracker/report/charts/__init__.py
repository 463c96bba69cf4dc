"""Draw charts of results with plotly.

Modules:
    cells: Draw charts of one model on one benchmark: drops, proxies, margins and lost documents.
    headline: Draw the first chart of the page.
    maps: Draw heat maps of layers against benchmarks, spans or heads.
    model: Draw the relevance and proxies of models over depth.
    style: Define colours, axes and hover boxes for all charts.
"""
