"""Decayed linear attention: reference.py defines it, api.py is what others call."""
