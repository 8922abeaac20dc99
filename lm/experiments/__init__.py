"""History and demonstrations."""
