"""Load benchmarks with lm-eval. No other package of tracker imports lm-eval.

Modules:
    base: Define the interface that all benchmarks implement.
    benchmark: Open the benchmark that a request names.
    corpus: Read plain text as a benchmark.
    encoder: Tokenise requests with lm-eval's own code.
    factory: Build lm-eval's tasks on data from the hub, a folder or a package.
    fingerprint: Identify a task by its documents, settings and code.
    generation: Generate texts with lm-eval's own code.
    own: Read task files that the user wrote, without importing lm-eval.
    parts: Split a benchmark into calibration and test documents.
    private: Import and patch lm-eval's private functions.
    reference_process: Score a checkpoint with plain lm-eval, in a separate program.
    results: Write lm-eval's result files from stored model answers.
    samples: Derive metrics from sampled texts and from their beginnings.
    sources: Find the data of a benchmark on the hub, in a folder or in a package.
    standalone: Write a benchmark as task files that lm-eval can read without tracker.
    tasks: Adapt lm-eval's tasks and groups to the interface in `base`.
    traces: Let changed models read texts that the intact model wrote, and score them.
"""
