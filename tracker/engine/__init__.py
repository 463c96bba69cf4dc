"""Compute all ablations together, sharing work over layers and tokens.

Modules:
    forward: Run layers for all streams at once, with a class for each intervention.
    scoring: Compute log-likelihoods and generated texts of all ablations.
    selfcheck: Test that sharing is exact for a model.
    observers: Compute proxies and other statistics of layers.
    fitting: Fit replacements of layers by least squares.
    lockstep: Run several passes layer by layer, so that offloaded weights are loaded once.
    plan: Estimate the work of a cell before measuring it.
    refusal: Distinguish what a model cannot do from errors of tracker.
"""
