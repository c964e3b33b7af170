"""Serve the databases that are open in this process.

The package has their connections, the registry, and the threads that serve them.
"""
