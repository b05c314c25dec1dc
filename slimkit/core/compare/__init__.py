"""Judging: what a smaller model lost, measured on held-out data, with intervals that say whether it is real."""

TASKS = ("language", "encoder", "classifier")
