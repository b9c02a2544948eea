"""Rules, passes, pipelines and recipes, and how they rewrite a program."""
