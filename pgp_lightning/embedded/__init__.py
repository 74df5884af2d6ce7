"""The embedded world, its pair of models, and how they were made."""
