"""Tests with hostile or damaged input."""
