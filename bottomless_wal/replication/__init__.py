"""Replicate one local database to its remote log: store commits, and recover at open."""
