"""Runs in, the paper's tables and figures out."""
