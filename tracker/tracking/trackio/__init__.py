"""Publishes cells to Trackio, and reads them back: SQLite files on this machine, in W&B's words.

The SDK lives in a process of its own: see `isolated`.
"""
