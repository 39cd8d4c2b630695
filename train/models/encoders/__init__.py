"""Encoders of images and of texts, and the decoder of masked patches."""
