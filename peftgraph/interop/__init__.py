"""Files and models of other people: adapter directories, plain transformers models."""

from peftgraph.interop.write_back import write_back as write_back
