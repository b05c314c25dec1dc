"""Small networks of many families, for the pruning tests."""
