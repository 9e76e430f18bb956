"""What a run survives, and what stops it."""
