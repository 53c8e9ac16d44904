"""One tile of a topic model: scores, ratio and both products at once."""
