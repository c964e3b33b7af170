"""Tests that kill processes, at named failpoints and at random."""
