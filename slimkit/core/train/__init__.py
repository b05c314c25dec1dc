"""Training without a framework: the loop, callbacks, history, resuming."""
