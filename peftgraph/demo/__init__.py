"""The quickstart: trains a classifier of sentences on a real encoder, folds it, proves it, exports it and reports.

`peftgraph quickstart` is the only thing that imports this package; `quickstart.run` is its entry.
"""
