"""What a step costs: FLOPs, device memory, and profiles of where the time went."""
