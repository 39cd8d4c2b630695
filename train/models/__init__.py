"""What is trained: encoders, towers around them, the LLM, and models read from folders."""
