"""Models of transformers in local folders: read with or without weights, called with example inputs, written whole."""
