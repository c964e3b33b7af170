"""Longer runs of what the test suite runs briefly: crashes, exits, damage, the model, long histories."""
