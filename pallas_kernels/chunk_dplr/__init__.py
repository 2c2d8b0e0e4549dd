"""Transitions that are diagonal plus low rank (RWKV-7): reference.py defines the op, api.py is what
others call."""
