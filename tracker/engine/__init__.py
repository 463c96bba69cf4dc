"""Compute all ablations of a model together, sharing work over layers and tokens.

Modules:
    forward: Run layers for many ablations in one batch, with a class for each intervention.
    scoring: Compute log-likelihoods and generated texts of all ablations.
    selfcheck: Test that shared computation gives exact results for a model.
    observers: Compute proxies and other statistics of layers and experts.
    fitting: Fit simple functions that replace layers, by least squares.
    lockstep: Run several forward passes layer by layer, so that offloaded weights are loaded once.
    plan: Estimate the cost of a measurement before it starts.
    refusal: Distinguish errors caused by a model from errors of tracker.
"""
