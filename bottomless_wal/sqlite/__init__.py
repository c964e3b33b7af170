"""SQLite's files, WAL, VFS and locks. This package imports nothing of the replication."""
