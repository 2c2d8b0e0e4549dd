"""The delta rule, with or without a decay: reference.py defines it, api.py is what others call."""
