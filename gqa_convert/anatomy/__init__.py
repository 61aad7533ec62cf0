"""What in a model depends on its KV heads, read off the model's own code."""
