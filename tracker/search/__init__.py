"""Search for the parts of a model to remove, and for weights to store in fewer bits.

Modules:
    accuracy_budget: Define the largest acceptable loss, and test which models are within it.
    cells: Measure a model under the removals that a search tries.
    conduct: Run the searches of a file, recommend a model, and store and publish the results.
    formats: Choose number formats for the weights of linear maps within a budget of bits.
    planning: Simulate a search with random scores to predict its possible results and its cost.
    report: Compare the results of searches in sentences, tables and charts.
    request: Read search requests from an experiment file or from command-line options.
    scores: Measure the loss of sets of removed parts on calibration documents.
    search: Run one search until it has removed the requested amount.
    settings: Define and parse the settings of a search: the amount to remove, the layers to keep.
    strategies: Define the search strategies.
"""
