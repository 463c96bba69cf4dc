"""Compute statistics of layers and experts other than benchmark outcomes.

Modules:
    layer_proxies: Compute proxies: divergence, loss, logit lens, Taylor, angles, loads of experts.
    perturbation_growth: Follow a perturbed layer's effect through all later layers.
    rounding_error: Compute the errors of linear maps, embeddings and output heads in a format.
"""
