"""Roles: which part of a graph is an attention's q, a feed-forward's up, a block."""
