"""Compile-only: whether a model fits a machine, how fast it would be there, and on which mesh."""
