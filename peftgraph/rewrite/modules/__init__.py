"""Modules that passes insert at a site: low-rank paths, bottlenecks, gates, and the initialisers of their
parameters."""
