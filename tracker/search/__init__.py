"""Search for what a model needs least: parts to remove, and weights for fewer bits.

Modules:
    cells: Measure removals as a search asks for them.
    conduct: Run searches from the file to the published records.
    formats: Choose formats of linear maps within a budget of bits.
    planning: Run a search on random scores: which sets it may end with, and its cost.
    report: Compare searches; describe their results in sentences, tables and charts.
    request: Read the request of a search from a file or options.
    scores: Score sets of removals on calibration documents.
    search: Run one search until its budget is met.
    settings: Define and read settings: how much is removed, and which parts stay.
    strategies: Define the search strategies.
"""
