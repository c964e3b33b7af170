"""Tests of `bottomless_wal.core`."""
