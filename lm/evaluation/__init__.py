"""What a model can and cannot do, measured against truth that is known, with honest intervals."""
