"""What is read: shards, their indexes, the stream of steps computed from the indexes alone, and the reader of bytes.

text and image turn one sample into tokens and patches; index lists what a shard holds; order, packing and stream
decide what each step contains; reader fetches exactly those bytes. Numpy arrays in and out, no torch.
"""
