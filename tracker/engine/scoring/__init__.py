"""Compute log-likelihoods for all ablations, sharing work over layers and tokens.

Modules:
    generation: Generate texts for all ablations in one batch.
    head: Run the embedding, and the output head at predicting tokens, also with rounded weights.
    masks: Build the attention masks of a row.
    model: Access the parts of a model, call the intact model, and make changed copies of a model.
    row_size: Measure the time of rows of several sizes, and choose the fastest size.
    rows: Build prefix trees of requests, and pack the trees into rows.
    score: Compute the common beginning of documents once, and score one row of requests.
    sweep: Score all documents for all ablations.
"""
