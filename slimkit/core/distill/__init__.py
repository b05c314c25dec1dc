"""Distillation without a framework: configuration, reference losses, the teacher's cache."""
