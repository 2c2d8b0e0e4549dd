"""Slots of unit norm, each moved at a right angle to itself, token by token."""
