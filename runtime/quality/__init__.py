"""What a model gets right: perplexity, distance from a reference, multiple choice."""
