"""What the outcomes and hidden states say: pure functions, one measure each."""
