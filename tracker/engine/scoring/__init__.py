"""Compute log-likelihoods of all ablations, sharing layers and tokens.

Modules:
    generation: Generate texts under every ablation at once.
    head: Run embedding and output head, also quantised; the head only at predicting tokens.
    masks: Build the attention masks of a row.
    model: Access the parts of a model, call the intact model, and make changed copies.
    row_size: Time rows of several sizes and choose the fastest size.
    rows: Build prefix trees of requests, and pack them into rows.
    score: Read the common beginning of documents once, and score one row.
    sweep: Score all documents under all ablations.
"""
