"""Copies of a stretch of a graph at a smaller width, with parameters of their own."""
