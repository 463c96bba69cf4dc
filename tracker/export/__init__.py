"""Save a model without some parts, and prove what it scores.

Modules:
    checkpoint: Write a checkpoint and move it into place.
    chosen: Find the searches and runs in a results folder that chose its layers.
    facts: Describe a saved model on its card.
    proof: Score a saved model with plain lm-eval in a fresh process.
    recipes: Write how other tools make the same model.
"""
