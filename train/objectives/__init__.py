"""Losses: of the language model, of image-text pairs (SigLIP, SuperClass), of frames and sound."""
