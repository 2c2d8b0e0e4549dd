"""Token mixers built from other mixers, one file for each way of combining; found like cells."""
