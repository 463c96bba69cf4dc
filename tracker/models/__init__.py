"""Find and load models, find their parts, and make changed copies.

Modules:
    checkpoint: Save changed models, or model objects from notebooks, as checkpoints.
    counterexample: Build the transformer that proves the theorem of the paper.
    devices: Query accelerators, and copy data to and from them.
    gguf_file: Parse GGUF files.
    hooks: Read and replace the arguments and outputs of module calls.
    layers: Find the decoder layers.
    load: Load a model and its tokenizer.
    miniature: Build a small model of the same class with random weights.
    narrowed: Copy a model with fewer heads, experts or neurons in each layer.
    offloaded: Choose the layers to offload, and load an offloaded layer when it is needed.
    parts: Find, remove and quantise parts of layers, such as heads, experts and linear maps.
    pruned: Copy a model without some layers.
    rounding: Round weights to a quantisation format.
    sources: Locate a model on the hub, in a folder, in a file or in a package.
"""
