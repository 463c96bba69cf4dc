"""Compute log-likelihoods for all ablations, sharing work over layers and tokens.

Modules:
    generation: Generate texts for all ablations in one batch.
    head: Run the embedding, and the output head at predicting tokens, also with rounded weights.
    masks: Build attention masks for requests that share tokens in a prefix tree.
    model: Access the parts of a model, call the intact model, and make changed copies of a model.
    row_size: Choose the fastest number of tokens per forward pass by timing several sizes.
    rows: Pack requests into rows; a row is a prefix tree or batch for one forward pass.
    score: Cache the prefix that all documents share, and score one row of requests.
    sweep: Score all documents for all ablations.
"""
