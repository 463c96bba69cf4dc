"""Rank what is comparable.

Modules:
    layers: Rank the layers of a model.
    models: Rank models.
    pairs: Compare pairs of models layer by layer.
    parts: Rank heads, experts and repeated spans.
    proxies: Compare the order of each proxy with the measured order.
"""
