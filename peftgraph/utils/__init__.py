"""Helpers that know nothing of programs: files that appear whole, regular expressions in bounded time."""
