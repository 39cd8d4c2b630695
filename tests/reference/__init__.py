"""A reference trainer in plain PyTorch: every formula of a training step written a second time.

Nothing here imports train/, parallel/, data/, Megatron-core or DeepSpeed.  The functions take weights as a dict of
tensors by their names in a checkpoint, and a batch as a dict of tensors; the tests next to them hand over the same
initial weights and batches to the real training loop and compare.  Parity tests compare two layouts of one program and
cannot see what is wrong in both; this package can.
"""
