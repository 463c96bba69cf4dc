"""Find, remove and round the parts of a model's layers, and its embeddings.

Names do not count, since every family has others: parts are found by structure, and proven by what
they do with a short text.

Modules:
    anatomy: Find the parts of one model, each kind once. Start reading here.
    catalog: List parts by a configuration alone.
    embeddings: Find and round the embedding and the output head.
    experts: Find and remove routed and shared experts.
    heads: Find and remove attention heads.
    linear_maps: Find and round the linear maps of a layer.
    probe: Record the calls of a layer's modules on a short text.
    sublayers: Find and silence attention and MLP of a layer.
"""
