"""Judging: what a smaller model lost, measured on held-out data, with intervals that say whether it is real."""

# The name of the model that the others are compared with.
DENSE = "dense"
TASKS = ("language", "encoder", "classifier")
