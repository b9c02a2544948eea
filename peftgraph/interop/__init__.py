"""Reads and writes adapter directories, merges adapters into checkpoints, writes weights back into plain models."""

from peftgraph.interop.write_back import write_back as write_back
