"""Scores of checkpoints: answers of language models, features and retrieval of encoders."""
