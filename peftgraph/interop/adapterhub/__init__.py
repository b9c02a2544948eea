"""Directories that the `adapters` library saved, read."""
