"""Find, remove and round the parts of a model's layers, and its embeddings.

Names differ between families of models. So parts are found by structure, and verified by their
effect on a short text.

Modules:
    anatomy: Find the parts of a model, or list them from the configuration. Start reading here.
    experts: Find and remove routed and shared experts.
    heads: Find and remove attention heads.
    linear_maps: Find and round linear maps of layers, the embedding and the output head.
    probe: Record the calls of a layer's modules on a short text.
    sublayers: Find and silence attention and MLP of a layer.
"""
