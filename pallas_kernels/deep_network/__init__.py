"""A network trained by gradient steps: reference.py defines it, api.py is what others call."""
