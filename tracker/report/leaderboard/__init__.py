"""Rank layers, models and proxies, and decide what is shown of them.

Modules:
    claims: Decide which statements about layers are supported, and word them.
    comparable: Select the records that may be ranked together.
    layers: Rank the layers of a model.
    models: Rank models.
    pairs: Compare pairs of models layer by layer.
    parts: Rank heads, experts and repeated spans.
    proxies: Compare the order of each proxy with the measured order.
    rules: Describe how the rankings are computed.
    tables: Build the tables of the leaderboards.
"""
