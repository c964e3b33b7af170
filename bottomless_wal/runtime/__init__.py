"""Databases that are open in this process: connections, the registry, and the threads that serve them."""
