"""Errors, configuration, threads, logs and locks: what every other package stands on. Knows neither SQLite nor storage."""
