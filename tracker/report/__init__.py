"""Turn records into tables, charts, words and one HTML page.

Modules:
    charts: Draw records with plotly.
    page: Render the HTML page.
    export: Write reports as Markdown, LaTeX, CSV, Parquet or images.
    frames: Build data frames.
    leaderboard: Build the tables of the leaderboards.
    tables: Build the tables that people read.
    texts: Render the sentences of templates.
    wording: Write what records show, warnings, and how rankings are read.
"""

import sys

from tracker.core.api_package import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
