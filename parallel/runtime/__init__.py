"""What a process needs to run: Megatron-core on a CPU, random states, times of phases."""
