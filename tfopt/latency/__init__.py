"""What layers cost on a target, measured, and what to keep of a network for so many milliseconds.

micro: files of one layer or a few, made in one child process and timed in turns (`times`, `race`). fill: measures a
table of a model's layers by their channels. table: reads it, and what lies between its cells. predict: what a network
costs with so many channels. budget: which numbers of channels lose least within a budget. knapsack: the same for
options that do not depend on each other, such as ranks.

found = parts.anatomy(model)
table = fill.measure(found, fill.file_of(model, spec, "int8"), "mine", micro.Place("local", "int8"), Path("t.json"))
predict.Latency(found, table).of([16, 24, 32])       # milliseconds with so many units in each group
"""
