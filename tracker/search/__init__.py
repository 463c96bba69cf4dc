"""Search for what a model needs least: parts to remove, and weights for fewer bits.

Modules:
    assignment: Choose formats by sums of losses, and swap them by measuring whole models.
    beforehand: Check before measuring which sets a search may end with.
    bit_budgets: Compute the bits of a choice of formats.
    budgets: Parse and compute how much is to be removed.
    cells: Measure removals as a search asks for them.
    conduct: Run searches from the file to the published records.
    constraints: Parse and apply which parts must stay.
    figures: Compare the results of several searches.
    format_requests: Request linear maps in formats, and observe their errors.
    planning: Estimate the cost of a search by running it on random scores.
    report: Describe the results of searches in sentences, tables and charts.
    request: Read the request of a search from a file or options.
    scores: Score sets of removals on calibration documents.
    search: Run one search until its budget is met.
    settings: Define the settings of a search.
    strategies: Define the search strategies.
"""
