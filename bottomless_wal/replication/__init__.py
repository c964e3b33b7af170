"""Replicate one local database to its remote log, and recover it at open."""
