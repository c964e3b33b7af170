"""Keep one local database and its remote log in step: commits become segments, and an open finds out where the file stands."""
