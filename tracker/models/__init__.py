"""Find and load models, find their parts, and make changed copies.

Modules:
    checkpoint: Make copies without some layers that can be saved; save models of notebooks.
    counterexample: Build the model of the paper's theorem.
    devices: Query the accelerators that torch sees; index tensors without waiting for them.
    gguf_file: Parse GGUF files.
    hooks: Read and replace calls of modules.
    layers: Find the decoder layers.
    load: Load a model and its tokenizer.
    miniature: Build a small model of the same class with random weights.
    offloaded: Decide which layers are offloaded, and load them when they are needed.
    parts: Find, remove and round the parts of layers.
    pruned: Copy a model without some layers; predict what a saved copy computes.
    rounding: Round weights to a format.
    sources: Find a model on the hub, in a folder, a file or a package.
"""
