"""Physical channel pruning: which channels of a Keras model hang together, which to remove, and the smaller model.

found = dependencies.analyze(model)                 what hangs together, and what has to stay
scores = importance.scores(found, "l1")             how much each unit matters
removed = choose.uniform(found, scores, 0.3)        which units go
smaller = cut.cut(found, removed)                   the model without them
"""
