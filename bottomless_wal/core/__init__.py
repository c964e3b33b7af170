"""Provide errors, configuration, threads, logs and locks to all packages.

This package imports neither SQLite's side nor the storage.
"""
