"""Evaluation: what pruning keeps, what it costs, and reports of both."""
