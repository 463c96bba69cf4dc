"""Time the engine against other ways, and check an installation.

Modules:
    compare: Time the engine and the loops on the same documents.
    doctor: Check that an installation computes the right numbers on a device.
    features: Run each feature of the engine, to compare two engines.
    loops: Evaluate all documents once per ablation, with lm-eval's Hugging Face model.
    vllm: Evaluate them with lm-eval's vLLM model, which skips the removed layers.
"""
