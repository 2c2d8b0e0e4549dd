"""Measurements of memories: what is stored, how well it is recalled, and how a state changes.

pairs.py stores given keys and values in any cell; recall.py scores what it answers; states.py
measures states over time; laws.py has the closed forms; layers.py opens the layers of a trained
model; intervention.py finds where a model keeps an association. `python -m memjax.probe` runs them.
"""
