"""Capture of a model with torch.export, and its normalisation to one canonical form."""

from peftgraph.capture.trace_model import Options, capture, capture_part

__all__ = ["Options", "capture", "capture_part"]
