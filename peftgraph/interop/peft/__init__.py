"""A plug-in that reads and writes adapter directories of huggingface/peft; it knows the passes that express them."""
