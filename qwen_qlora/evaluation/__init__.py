"""Measuring a model on a test file."""
