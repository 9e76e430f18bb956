"""Ready reward functions."""
