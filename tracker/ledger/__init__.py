"""Store outcomes on disk, and derive figures from them.

Modules:
    aligned: Align the outcomes of the documents that all runs share.
    blocks: Divide documents into the blocks that are computed and locked together.
    cache: Keep a per-user cache, and decide when to trust it.
    cells: Read and write one cell.
    decisions: Compare the chosen options of each run with the intact model's.
    early_stopping: Apply the stopping rules of `until` to stored outcomes.
    files: Write files atomically, with locks and digests.
    options: Score the options of documents.
    outcomes: Define the columns of a shard.
    paired: Compare the same documents with and without a change.
    runs: Compute the figures of one run.
    shards: Read and write shards as Parquet files.
    store: Read and write the results folder.
    tables: Compute the record of a cell.
    texts: Store the texts of documents.
    verify: Verify a results folder, and compare two copies.
    views: Name cells, and store which runs and documents were requested.
"""
