"""Prompts, and which of them each generation batch has."""
