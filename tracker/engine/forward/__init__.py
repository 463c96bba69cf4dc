"""Run a model's layers for many ablations in one batch, with a class for each intervention.

Modules:
    layer: Run layers for all streams (parts of a batch); skip, replace and repeat whole layers.
    modules: Change modules within a layer: sublayers, heads, experts and quantised weights.
    streams: Plan at which layer each ablation starts its own stream.
"""
