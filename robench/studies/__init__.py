"""Whole studies: what is trained, attacked and drawn together."""
