"""What layers cost on a target, measured.

micro: files of one layer or a few, made in one child process and timed in turns. knapsack: one option for each
layer, the least lost within a budget.
"""
