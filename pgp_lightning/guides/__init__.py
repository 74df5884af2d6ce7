"""Guides: a request in, an importance for every visual token out."""
