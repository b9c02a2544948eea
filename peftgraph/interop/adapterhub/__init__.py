"""A plug-in that reads adapter directories of AdapterHub's `adapters`; it knows the passes that express them."""
