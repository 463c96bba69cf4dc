"""Compare the speed of tracker's engine with other programs, and check an installation.

Modules:
    compare: Time the engine and lm-eval's evaluation loops on the same documents.
    doctor: Check that an installation computes the right numbers on a device.
    loops: Evaluate all documents once per ablation, with lm-eval's own models.
"""
