"""Attribution graphs: which features, tokens and biases a prediction is the sum of."""
