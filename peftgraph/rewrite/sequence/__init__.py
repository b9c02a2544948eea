"""Rows in front of a sequence of tokens."""
