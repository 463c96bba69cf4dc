"""Render results as tables, charts, sentences and one HTML page.

Modules:
    charts: Draw charts of results with plotly.
    page: Render the HTML page.
    dataset: Write and read data sets of layer profiles.
    evaluations: Write results as records of every_eval_ever.
    export: Write reports as Markdown, LaTeX, CSV, Parquet or images.
    frames: Build data frames of runs, correlations and documents.
    leaderboard: Build the tables of the leaderboards.
    tables: Build the tables that people read, with rounded numbers.
    wording: Write sentences about results, warnings and rankings.
"""

import sys

from tracker.schema.distribution import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
