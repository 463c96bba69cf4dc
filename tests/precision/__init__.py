"""Tests of the room that chooses formats of weights."""
