"""Quantized linear layers, and how they come into a model."""
