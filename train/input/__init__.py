"""From a planned step to micro-batches on the device, prefetched."""
