"""Define the types that all packages share: requests, records, errors.

Modules:
    answers: Write the answer to a cell's question as a sentence.
    api_package: Call a package as the function of the API that has its name.
    changes: Define a change of a model, its text, and sets of changes.
    config: Define the settings and the request of one cell, and expand its changes.
    decision_records: Define records of the documents that a run loses and wins.
    distribution: Define the package's name, version and installation commands.
    documents: Define tokenised documents and the responses to them.
    errors: Define the errors that tracker raises.
    estimates: Define a value with its interval.
    experiment: Define the experiment file, which is also a W&B sweep.
    experiment_input: Read a request from a file, a model's name, a dict or keywords.
    extensions: Load what other packages add by entry points.
    extent: Choose the documents of a benchmark: a half, the first or a random sample.
    fields: Define the types of settings, and report the first problem of some.
    findings: Define the results of a study: answers, tables and charts.
    formats: Format numbers, intervals and p-values for people.
    grouping: Group items by a key.
    hub: Check that the Hugging Face hub answers, and explain its errors.
    identities: Define what identifies a model and a benchmark.
    kinds: Define the interventions and how charts draw them.
    model_parts: Count a model's layers, heads and experts.
    provenance: Record hashes, versions and the machine of a measurement.
    proxies: Define the proxies and their formulas.
    prune_records: Define the records of a search.
    questions: Define the questions of `until`, which end a measurement early.
    records: Define the frozen records of cells, runs and correlations.
    remote: Call objects in processes of their own.
    run_table: Define the columns of the tables of runs and correlations.
    safe_yaml: Read YAML with bounds on its size.
    search_parts: Number the parts that a search removes.
    tables: Define a table as columns and rows.
    text: Escape text for terminals, Markdown and CSV, and mask passwords.
    views: Define which runs and documents of a cell are shown.
    weight_formats: Define the formats of weights and their sizes.
"""
