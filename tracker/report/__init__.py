"""Turn records into tables, charts, words and one HTML page.

Modules:
    charts: Draw records with plotly.
    leaderboard: Rank layers, models and proxies.
    page: Render the HTML page.
    caveats: Write warnings about versions, devices and missing documents.
    editions: Tell editions of an edited task apart.
    export: Write reports as Markdown, LaTeX, CSV, Parquet or images.
    frames: Build data frames.
    labels: Tell models and cells apart.
    layer_figures: Compute the figures of one whole layer.
    tables: Build the tables that people read.
    wording: Write sentences about records.
"""

import sys

from tracker.core.api_package import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
