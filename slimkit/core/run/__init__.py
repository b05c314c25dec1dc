"""Recipes without a framework: schema, runner, measurements, report."""
