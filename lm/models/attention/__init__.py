"""Attention: the layer, and what computes it on each platform."""
