"""Directories of huggingface/peft, read and written."""
