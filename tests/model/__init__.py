"""A model-based test of all parts together."""
