"""Find, remove and quantise parts of a model's layers.

The names of modules differ between model families, so this package identifies parts by the
structure of the modules.

Modules:
    anatomy: Find the parts of a model, by running the model or from its configuration.
    experts: Find and remove routed and shared experts.
    heads: Find and remove attention heads.
    linear_maps: Find and quantise linear maps of layers, the embedding and the output head.
    neurons: Find the neurons of MLPs, and group them by the norms of their weights.
    probe: Record the calls of a layer's modules on a short text.
    projection: Remove parts that are input columns of an output projection, e.g. heads.
    sublayers: Find and remove the attention and the MLP of a layer.
"""
