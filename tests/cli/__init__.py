"""Tests of `bottomless_wal.cli`."""
