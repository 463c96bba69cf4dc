"""Turn records into tables, charts, words and one HTML page.

Modules:
    charts: Draw records with plotly.
    page: Render the HTML page.
    caveats: Write warnings about versions, devices and missing documents.
    export: Write reports as Markdown, LaTeX, CSV, Parquet or images.
    frames: Build data frames.
    leaderboard: Build the tables of the leaderboards.
    rules: Describe how rankings are computed and correlations are read.
    tables: Build the tables that people read.
    wording: Write sentences about records.
"""

import sys

from tracker.core.api_package import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
