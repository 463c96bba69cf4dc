"""Publish the results of team members, and write reports about the results of a whole team.

Modules:
    collect: Collect results from several results folders and tracking projects.
    live: Show interim results in tracking backends while a measurement runs.
    publish: Publish results to tracking backends, and record which results each backend has.
    reports: Write reports of collected results, and publish reports to tracking backends.
    result_files: Write the results of a folder as lm-eval's result files.
    sweeps: Complete failed trials of a W&B sweep with results from the results folder.
"""
