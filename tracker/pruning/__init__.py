"""From importance to a lighter model: which parts to take out, and the checkpoint without them.

Searches are asked for in `asked`, conducted by `conduct`, and choose by `strategies`. A checkpoint
is written and moved into place by `export`, held against plain transformers and plain lm-eval by
`proof`, described by `card`; `recipes` say how other tools make the same model.
"""
