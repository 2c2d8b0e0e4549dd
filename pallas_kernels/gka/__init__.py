"""Ridge regression over all past pairs: reference.py defines it, api.py is what others call."""
