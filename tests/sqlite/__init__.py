"""Tests of `bottomless_wal.sqlite`."""
