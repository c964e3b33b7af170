"""Tests of `bottomless_wal.replication`."""
