"""Compute all ablations of a model together, so that they share computation.

Modules:
    forward: Run layers for many ablations in one batch, with a class for each intervention.
    scoring: Compute log-likelihoods and generated texts of all ablations.
    selfcheck: Test that shared computation gives exact results for a model.
    observers: Compute proxies and other statistics of layers and experts.
    fitting: Fit simple functions that replace layers, by least squares.
    lockstep: Run several forward passes together, so that each offloaded layer is loaded once.
    plan: Estimate the cost of a measurement before it starts.
    refusal: Determine whether an exception was caused by the model or by tracker's own code.
"""
