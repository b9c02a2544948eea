"""Rows prepended to a sequence of tokens."""
