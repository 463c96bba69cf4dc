"""Store outcomes on disk: files only.

Modules:
    blocks: Divide documents into the blocks that are computed and locked together.
    cache: Keep a per-user cache, and decide when to trust it.
    cells: Read and write one cell.
    files: Write files atomically, with locks and digests.
    outcomes: Define the columns of a shard.
    shards: Read and write shards as Parquet files.
    store: Read and write the results folder.
    texts: Store the texts of documents.
    verify: Verify a results folder, and compare two copies.
    views: Name cells, and store which runs and documents were requested.
"""
