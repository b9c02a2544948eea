"""Merging into a checkpoint shard by shard: no more than a few of its tensors are in memory at once."""
