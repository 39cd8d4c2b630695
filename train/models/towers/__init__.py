"""What the encoder's engine trains as one module, by task: an encoder and the parts around it."""
