"""Attention against recurrence, on tasks whose difficulty is known."""
