"""Search for the parts of a model to remove, and for weights to store in fewer bits.

Modules:
    cells: Measure the removals that a search requests.
    conduct: Run searches from the file to the published records.
    formats: Choose formats of linear maps within a budget of bits.
    planning: Run a search on random scores to predict its possible results and its cost.
    report: Compare searches; describe their results in sentences, tables and charts.
    request: Read the request of a search from a file or options.
    scores: Score sets of removals on calibration documents.
    search: Run one search until its budget is met.
    settings: Define and read settings: the amount to remove, and the parts to keep.
    strategies: Define the search strategies.
"""
