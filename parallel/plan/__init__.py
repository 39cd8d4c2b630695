"""Which rank encodes which image, and where every row goes: functions of integer arrays, the same on all ranks."""
