"""Find and load models, find their parts, and make changed copies.

Modules:
    checkpoint: Make a copy without some layers that can be saved.
    counterexample: Build the model of the paper's theorem.
    devices: Query the accelerators that torch sees.
    gguf_file: Parse GGUF files.
    hooks: Read and replace calls of modules.
    in_memory: Save a model object that a notebook holds.
    layers: Find the decoder layers.
    load: Load a model and its tokenizer.
    miniature: Build a small model of the same class with random weights.
    offloaded: Load offloaded weights when a layer needs them.
    parts: Find, remove and round the parts of layers.
    placement: Decide which layers are offloaded.
    pruned: Copy a model without some layers.
    reloaded: Predict what a saved copy computes after loading.
    rounding: Round weights to a format.
    slices: Index tensors by slices.
    sources: Find a model on the hub, in a folder, a file or a package.
"""
