"""Tests of `bottomless_wal.runtime`."""
