"""Compute figures of layers and experts other than benchmark outcomes.

Modules:
    divergence: Compute proxies of the model's output: divergence, loss, logit lens, Taylor.
    end_errors: Compute the errors of embeddings and output heads in a format.
    expert_load: Count the tokens of each expert and the size of its output.
    perturbation_growth: Follow a perturbed layer's effect through all later layers.
    rounding_error: Compute the errors of linear maps in a format.
    span_similarity: Compute how far spans of layers turn the residual stream.
"""
