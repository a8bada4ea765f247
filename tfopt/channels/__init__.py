"""Physical channel pruning of Keras graphs: which channels belong together, which matter least, and a smaller model.

dependencies.py   walk the graph: the channels that can only go together
importance.py     how much a channel matters
choose.py         which channels go
cut.py            the smaller model
"""
