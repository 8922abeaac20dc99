"""lm: one readable repository for the whole life of a language model."""
