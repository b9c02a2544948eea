"""Writes a program as a file that runs without peftgraph; each format is an exporter, found by its suffix."""
