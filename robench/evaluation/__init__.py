"""Evaluation: threats become cells, cells become rows."""
