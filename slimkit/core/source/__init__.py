"""Reading and editing a model's own source code, for both frameworks."""
