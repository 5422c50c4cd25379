"""Programs around a finished training run."""
