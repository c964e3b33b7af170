"""Byte layouts: one encoder, one decoder and one validator for each format. Pure functions; no I/O."""
