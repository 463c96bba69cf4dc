"""Run a model's layers for all streams at once, one class for each intervention.

Modules:
    layer: Run layers for all streams; skip, replace and repeat whole ones.
    modules: Change modules of a layer: sublayers, heads, experts, weights in formats.
    streams: Plan at which layer each ablation forks off.
"""
