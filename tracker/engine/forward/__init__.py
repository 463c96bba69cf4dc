"""Run a model's layers for all streams at once, with a class for each intervention.

Modules:
    layer: Run layers for all streams; skip, replace and repeat whole layers.
    modules: Change modules of a layer: sublayers, heads, experts, quantised weights.
    streams: Plan at which layer each ablation forks off.
"""
