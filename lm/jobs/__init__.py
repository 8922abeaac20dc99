"""The jobs that `main.py` can name: each puts rooms together, and has its own config."""
