"""Attention to the last tokens: reference.py defines it, api.py is what others call."""
