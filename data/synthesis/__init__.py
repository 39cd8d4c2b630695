"""A toy corpus from images that ship inside scikit-learn and scikit-image; nothing is downloaded."""
