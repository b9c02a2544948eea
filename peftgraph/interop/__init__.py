"""Reads and writes adapter directories, merges adapters into checkpoints, writes weights back into plain models."""
