"""What methods cost on a model: parameters, files, memory, operations, computed from the graph without weights."""
