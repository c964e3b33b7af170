"""Tests of `bottomless_wal.admin`."""
