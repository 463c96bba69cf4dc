"""Find and load models, find their parts, and make changed copies.

Modules:
    checkpoint: Make a copy without some layers that can be saved.
    counterexample: Build the model of the paper's theorem.
    devices: Query the accelerators that torch sees.
    ends: Find the embedding and the output head.
    experts: Find and remove routed experts.
    gguf_file: Parse GGUF files.
    heads: Find and remove attention heads.
    in_memory: Save a model object that a notebook holds.
    kept: Read in which format a checkpoint keeps its weights.
    layers: Find the decoder layers.
    linear_maps: Find the linear maps of a layer.
    load: Load a model and its tokenizer.
    maps: List linear maps from a configuration alone.
    miniature: Build a small model of the same class with random weights.
    offloaded: Load offloaded weights when a layer needs them.
    parts: Find the heads and experts that a search may remove.
    placement: Decide which layers are offloaded.
    pruned: Copy a model without some layers.
    quantised: Round weights to a format.
    reloaded: Predict what a saved copy computes after loading.
    shared_experts: Find shared experts.
    slices: Index tensors by slices.
    sources: Find a model on the hub, in a folder, a file or a package.
    sublayers: Find attention and MLP of a layer.
"""
