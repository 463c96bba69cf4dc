"""Compute statistics of layers and experts in addition to benchmark outcomes.

Modules:
    layer_proxies: Compute proxies: divergence, loss, logit lens, angles, loads of experts.
    perturbation_growth: Measure the effect of a perturbed layer in all later layers.
    rounding_error: Compute the errors of quantised linear maps, embeddings and output heads.
    taylor: Measure first-order Taylor terms: gradient × change of an output.
"""
