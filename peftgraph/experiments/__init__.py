"""Trains a recipe on a file of examples: what `peftgraph train` does.

`settings` and `examples` are read before torch is imported; `run` trains, through transformers' Trainer.
"""
