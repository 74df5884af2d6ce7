"""Pruners: one paper, one file."""
