"""Save changed models as checkpoints, and prove that the files are the measured models.

Modules:
    card: Write the model card, the facts as JSON, and recipes of other tools.
    changes: Describe and apply changes; find the searches and runs that chose each change.
    checkpoint: Write a checkpoint, prove it, move it to its folder and publish it.
    facts: Define the facts about a saved model.
    proof: Score a saved model with plain lm-eval in a fresh process.
"""

import sys

from tracker.core.api_package import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
