"""Run a model's layers for all streams at once, one class for each intervention.

Modules:
    base: Define forks of a layer's modules, and operations by stream.
    experts: Remove routed and shared experts.
    forking: Replace the forward passes of a model's layers.
    heads: Remove attention heads.
    layer: Run one layer for all streams.
    replacements: Define what replaces a layer: a mean update, a factor or a linear map.
    rounding: Compute linear maps and experts with weights in formats.
    streams: Plan at which layer each ablation forks off.
    sublayers: Remove attentions and MLPs.
    whole_layers: Skip, replace and repeat layers.
"""
