"""Compute log-likelihoods of all ablations, sharing layers and tokens.

Modules:
    copies: Make copies of a model that are really changed.
    decode: Generate texts under every ablation at once.
    generation: Generate texts in groups that fit into memory.
    head: Run the output head only at predicted tokens.
    idle: Find experts that no token of a row is routed to.
    masks: Build the attention masks of a row.
    model: Take a model apart, and cache facts about it.
    plain_call: Score one request in one plain call of the model.
    prefix: Read the common prefix of documents once.
    rounded_embeddings: Compute embeddings and output heads in formats.
    row_size: Time rows of several sizes and choose the fastest.
    rows: Pack requests into rows.
    score: Score one row.
    sharing: Define what ablations may share, and the quirks of a model.
    sweep: Score all documents under all ablations.
    tree: Build a prefix tree of requests.
"""
