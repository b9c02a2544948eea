"""Modules that passes insert beside a site: low-rank paths, bottlenecks, gates, and how their parameters start."""
