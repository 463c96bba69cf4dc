"""Compute log-likelihoods of all ablations, sharing layers and tokens.

Modules:
    generation: Generate texts under every ablation at once.
    head: Run embedding and output head, in formats, the head only at predicted tokens.
    masks: Build the attention masks of a row.
    model: Take a model apart, call it plainly, and make changed copies.
    row_size: Time rows of several sizes and choose the fastest.
    rows: Build prefix trees of requests, and pack them into rows.
    score: Read a common beginning once, and score one row.
    sweep: Score all documents under all ablations.
"""
