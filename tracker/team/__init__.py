"""Publish, collect and report the results of all members of a team.

Modules:
    collect: Collect results from several results folders and tracking projects.
    live: Show interim results in trackers during the measurement.
    publish: Publish results to trackers, and record which results each tracker has.
    reports: Write reports of collected results, and publish reports to trackers.
    result_files: Write the results of a folder as lm-eval's result files.
    sweeps: Complete failed trials of a W&B sweep with results from the ledger.
"""
