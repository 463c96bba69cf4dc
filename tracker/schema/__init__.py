"""Define the types that all packages of tracker share: requests, records, errors.

Modules:
    answers: Format the result of the setting `until` as a sentence.
    changes: Define changes of a model, and sets of changes.
    config: Define the settings and the request for one model on one benchmark.
    distribution: Define the package's name, version, installation commands and callable packages.
    documents: Define tokenised documents and the responses to them.
    errors: Define the errors that tracker raises.
    estimates: Define an estimate: a value with a confidence interval.
    experiment: Define the format of experiment files, which are also W&B sweep files.
    experiment_input: Read an experiment from a file, a model's name, a dict or keywords.
    extensions: Load extensions that other packages register as entry points.
    extent: Select documents of a benchmark: a half, the first documents, or a random sample.
    fields: Define the types of settings, and report the first invalid setting.
    findings: Define the results of a study: answers, tables and charts.
    formats: Format numbers, intervals and p-values as text.
    grouping: Group items by a key.
    hub: Check whether the Hugging Face hub is reachable, and explain errors of the hub.
    identities: Define the identities of models and benchmarks.
    kinds: Define the interventions on a model (e.g. removal), and their colours in charts.
    model_parts: Count a model's layers, heads and experts.
    provenance: Collect hashes, software versions and the machine of a measurement.
    proxies: Define the proxies of layer importance (e.g. cosine score) and their formulas.
    prune_records: Define the records of a pruning search.
    questions: Define the stopping rules of the setting `until`, such as `top 5`.
    records: Define the immutable records of cells, runs and correlations.
    remote: Call the methods of an object that lives in another process.
    run_table: Define the columns of the tables of runs and correlations.
    safe_yaml: Read YAML with limits on the size of the content.
    search_parts: Number the layers or other parts that a search can remove.
    tables: Define a table as columns and rows.
    text: Escape text for terminals, Markdown and CSV, and mask passwords.
    text_templates: Render sentences from templates.
    views: Define a view: the runs and documents of one model and benchmark that a report shows.
    weight_formats: Define the weight formats (e.g. int4) and their sizes.
"""
