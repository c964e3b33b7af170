"""SQLite's side: its files, its WAL, its VFS and its locks. Knows nothing of replication."""
