"""The checkpoint format, its reader, its writer, and which checkpoints stay."""
