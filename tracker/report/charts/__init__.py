"""Draw records with plotly.

Modules:
    across: Draw several models over relative depth.
    cells: Draw the drops of one cell beside its proxies.
    decisions: Draw margins, and agreement in the lost documents.
    headline: Draw the first chart of the page.
    hover: Write the text of hover boxes.
    maps: Draw heat maps.
    model: Draw the relevance and proxies of one model over depth.
    style: Define colours, axes and traces that charts share.
"""
