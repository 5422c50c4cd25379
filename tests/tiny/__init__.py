"""Builders of tiny random checkpoints in the layouts the hubs hold."""
