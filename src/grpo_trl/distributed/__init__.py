"""Launches, sharded weights, and work shared between ranks."""
