"""Store the measured result (outcome) of each document in a results folder (ledger).

Modules:
    blocks: Divide documents into blocks; one process computes a block at a time.
    cache: Keep a cache for each user; ignore entries that other users can write.
    cells: Read and write one cell: the outcomes of one model on one benchmark.
    files: Write files atomically, with locks and digests.
    outcomes: Define the columns of a shard, which is a file of outcomes.
    shards: Read and write shards as Parquet files.
    store: Read and write the results folder.
    texts: Store the texts of documents.
    verify: Verify a results folder, and compare two copies of a results folder.
    views: Compute the keys of cells, and store the views (requests for results) of a cell.
"""
