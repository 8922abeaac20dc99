"""A run directory or a Hugging Face directory, opened: what every later job starts from."""
