"""Choose which parts of a model to remove, and save the smaller model.

Modules:
    search: Search for parts to remove.
    export: Save and prove the smaller model.
"""
