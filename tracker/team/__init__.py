"""Exchange results between the members of a team.

Modules:
    collect: Collect cells of several folders and projects.
    live: Show cells in trackers while they are measured.
    publish: Publish cells to trackers, and record which cells each tracker has.
    reports: Write and publish reports.
    result_files: Write the results of a folder as lm-eval's result files.
    sweeps: Complete the trials of a W&B sweep.
"""
