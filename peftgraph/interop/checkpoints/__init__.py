"""Merges adapters into a checkpoint shard by shard, with only a few of its tensors in memory at a time."""
