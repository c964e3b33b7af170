"""Provide the command line: each command calls one library function."""
