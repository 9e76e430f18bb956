"""Attention over groups that share their prompt, in training and in sampling."""
