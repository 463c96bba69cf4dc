"""Lighter models: saved as checkpoints that anybody loads, with what was measured of them.

A checkpoint is written and moved into place by `export`, held against plain transformers and plain
lm-eval by `proof`, described by `card`; `recipes` say how other tools make the same model.
"""
