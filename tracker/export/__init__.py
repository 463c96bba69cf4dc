"""Save changed models as checkpoints, and check that the saved files give the measured results.

Modules:
    card: Write the model card, the facts as JSON, and recipes to make the model with other tools.
    changes: Make changed copies of a model; find the searches that chose a change.
    checkpoint: Write a checkpoint, check its results, and publish it.
    facts: Define the facts about a saved model.
    gguf_model: Write a model with quantised weights as a GGUF file with llama.cpp, and check it.
    llama_cpp: Quantise, read and time GGUF files with llama.cpp.
    proof: Compare the saved files with the measured model, in a fresh process.
    serving: Measure speed and memory of a saved model and of its base model, in fresh processes.
    serving_process: Measure how fast models serve with plain transformers, as a separate program.
"""

import sys

from tracker.schema.distribution import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
