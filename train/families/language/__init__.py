"""One module per family of language models, named by its `model_type`: a module that is added here is a family without
an edit elsewhere."""
