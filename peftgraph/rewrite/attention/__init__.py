"""Rows of keys and values in front of an attention's own."""
