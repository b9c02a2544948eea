"""Selectors: which sites a pass wants, as objects and as text."""
