"""Compute the log-likelihoods of all ablations, with shared computation.

Modules:
    generation: Generate texts for all ablations in one batch.
    head: Run the embedding and the output head, with exact or rounded weights.
    masks: Build attention masks for requests that share tokens in a prefix tree.
    model: Access and call a model, and make changed copies.
    row_size: Choose the fastest number of tokens per forward pass by timing several sizes.
    rows: Pack requests into rows; each row is scored in one forward pass.
    score: Cache the prefix that all documents share, and score one row of requests.
    sweep: Score all documents for all ablations.
"""
