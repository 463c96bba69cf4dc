"""Find, remove and quantise parts of a model's layers; quantise its embeddings.

Module names differ between model families. So the package finds parts by their structure.

Modules:
    anatomy: Find the parts of a model, or list them from the configuration. Start reading here.
    experts: Find and remove routed and shared experts.
    heads: Find and remove attention heads.
    linear_maps: Find and quantise linear maps of layers, the embedding and the output head.
    neurons: Find the neurons of MLPs, and group them by the norms of their weights.
    probe: Record the calls of a layer's modules on a short text.
    projection: Remove parts that are input columns of a projection, such as heads and neurons.
    sublayers: Find the attention and the MLP of a layer, and make them add nothing.
"""
