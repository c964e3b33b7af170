"""Tests of `bottomless_wal.history`."""
