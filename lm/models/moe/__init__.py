"""Mixtures of experts: routing, and what carries tokens to their experts."""
