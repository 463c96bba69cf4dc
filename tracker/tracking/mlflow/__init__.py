"""Publish results to MLflow, and read published results back.

Modules:
    backend: Update an MLflow experiment with the results of a results folder.
    database: Create the SQLite file in which MLflow stores runs without a server.
    live_run: Show the progress of a measurement.
    models: Log pruned models as MLflow models.
    runs: Convert descriptions of runs to metrics, params and tags, without importing MLflow.
    service: Define the interface to MLflow for other packages, without importing MLflow.
    writing: Write one MLflow run.
"""

import os

# MLflow reads these when it is imported or when it connects, so they are set before any module here
# imports it; a user's own setting wins. Its own limits (7 retries of 120 s) would hold up a
# measurement for minutes when a server is down.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)
