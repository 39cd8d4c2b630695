"""Bytes of one image, video, sound or text, and the patches and tokens that become of them."""
