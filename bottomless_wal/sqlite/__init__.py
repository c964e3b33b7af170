"""Access SQLite's files, WAL, VFS and locks, without any replication."""
