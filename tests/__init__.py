"""Tests of the package, in folders named as its own."""
