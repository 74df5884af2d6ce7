"""Posterior-guided visual token pruning: train guides, score visual tokens, compare methods.

Nothing is imported here: command line and data workers start by importing this file.
"""

__version__ = "0.1.0"
