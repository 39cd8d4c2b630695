"""Models in folders of Hugging Face: teachers and text encoders."""
