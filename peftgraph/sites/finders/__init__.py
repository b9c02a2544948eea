"""Finders: one module for each kind of part, which finds its sites, says why they are sites, and what came close."""
