"""Selectors choose the sites of a pass, as objects or as text."""
