"""Publish results to Trackio's files on this machine, and read published results back.

Modules:
    backend: Update a Trackio project with the results of a results folder.
    service: Define the interface to Trackio for other packages, without importing Trackio.
"""
