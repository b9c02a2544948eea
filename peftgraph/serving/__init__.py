"""Many adapters in one graph: each row of a batch is computed with an adapter of its own."""
