"""Save changed models as checkpoints, and prove what they score.

Modules:
    card: Write the model card, facts for machines, and recipes of other tools.
    changes: Describe and apply changes, and find the searches and runs that chose them.
    checkpoint: Write a checkpoint, prove it, move it into place and publish it.
    facts: Define the facts about a saved model.
    proof: Score a saved model with plain lm-eval in a fresh process.
"""

import sys

from tracker.core.api_package import ApiPackage

sys.modules[__name__].__class__ = ApiPackage
