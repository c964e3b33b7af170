"""Tests of `bottomless_wal.storage`."""
