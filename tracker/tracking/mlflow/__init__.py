"""Write cells to MLflow, and read them back.

Modules:
    backend: Keep an MLflow experiment in step with the ledger.
    database: Create the local SQLite file.
    live_run: Show a cell during its measurement.
    models: Log pruned models.
    runs: Describe runs in MLflow's terms, without importing MLflow.
    service: Describe MLflow to the other packages, without importing MLflow.
    writing: Write one run.
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
