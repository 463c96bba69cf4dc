"""Store measured outcomes in a results folder (ledger) of plain files.

Modules:
    blocks: Divide documents into the blocks that are computed and locked together.
    cache: Keep a per-user cache, and decide when to trust it.
    cells: Read and write one cell: the outcomes of one model on one benchmark.
    files: Write files atomically, with locks and digests.
    outcomes: Define the columns of a shard, which is a file of outcomes.
    shards: Read and write shards as Parquet files.
    store: Read and write the results folder.
    texts: Store the texts of documents.
    verify: Verify a results folder, and compare two copies.
    views: Name cells, and store the requested runs and documents of a cell (views).
"""
