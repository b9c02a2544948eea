"""Rewrites of graphs that keep their meaning: less time, fewer bytes kept for the backward pass."""
