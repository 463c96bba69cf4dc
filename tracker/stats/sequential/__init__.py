"""Tests that may look after every block: intervals, the largest of many, when to stop."""
