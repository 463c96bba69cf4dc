"""Exchange results between the members of a team.

Modules:
    collect: Collect cells of several folders and projects.
    live: Show cells in trackers while they are measured.
    publish: Publish cells to trackers, and remember which tracker has what.
    reports: Write and publish reports.
    result_files: Write lm-eval's result files of a results folder.
    sweeps: Complete the trials of a W&B sweep.
"""
