"""Save changed models as checkpoints, and prove what they score.

Modules:
    card: Write the model card and the same facts for machines.
    changes: Describe and apply changes of layers and of weights.
    checkpoint: Write a checkpoint, prove it, move it into place and publish it.
    facts: Define the facts about a saved model.
    origin: Find the searches and runs in a results folder that chose its layers.
    proof: Score a saved model with plain lm-eval in a fresh process.
    recipes: Write how other tools make the same model.
"""

import sys

from tracker.core.api_package import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
