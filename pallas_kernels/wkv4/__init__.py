"""RWKV-4's average of past values."""
