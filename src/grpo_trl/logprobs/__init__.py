"""Logprobs of completions: what one forward sees, and what it computes."""
