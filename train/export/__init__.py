"""A trained model as a folder for others: weights under our names, a language model of a family of transformers, or the
whole model with the code that runs it.
"""
