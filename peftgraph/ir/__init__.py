"""Holds the data of a program (graph, tensor table, signature, edits) with its builder, verifier, printer and
interpreter."""
