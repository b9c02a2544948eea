"""Rows of keys and values prepended to an attention's own."""
