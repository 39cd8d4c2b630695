"""Sources of an exported folder.  transformers loads them from beside the weights, so they import torch, transformers
and each other alone.
"""
