"""What ranks send to each other, and hosts to devices: exchange of visual rows, context parallelism, the ring."""
