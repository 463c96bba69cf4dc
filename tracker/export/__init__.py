"""Save changed models as checkpoints, and prove that the files give the measured results.

Modules:
    card: Write the model card, the facts as JSON, and recipes to make the model with other tools.
    changes: Describe and apply changes of a model; find the searches and runs that chose them.
    checkpoint: Write a checkpoint, prove it, move it to the output folder and publish it.
    facts: Define the facts about a saved model.
    proof: Score a saved model with plain lm-eval in a fresh process.
"""

import sys

from tracker.schema.api_package import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
