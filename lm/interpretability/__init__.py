"""Looking inside: what a model's activations, heads, features and gradients say of what it does."""
