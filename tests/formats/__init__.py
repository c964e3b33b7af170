"""Tests of `bottomless_wal.formats`."""
