"""Figures and tables: pure functions of the table of outcomes."""
