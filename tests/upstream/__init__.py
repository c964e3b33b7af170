"""Tests that pin the behaviour of SQLite, APSW, the operating system and the servers."""
