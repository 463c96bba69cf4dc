"""Compute statistics of layers and experts in addition to benchmark outcomes.

Modules:
    layer_proxies: Compute proxies such as divergences, angles and the load of experts.
    perturbation_growth: Measure the effect of a perturbed layer in all later layers.
    rounding_error: Compute the errors of quantised linear maps, embeddings and output heads.
    taylor: Compute first-order Taylor terms, the gradient times the change of an output.
"""
