"""Runs the tables and figures of the paper: python -m bsce_jax.reproduce --table 1."""
