"""Wrappers: a memory cell made of another one; every module here is discovered."""
