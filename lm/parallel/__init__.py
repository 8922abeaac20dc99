"""The ground every room stands on: the mesh, and the one table from logical to mesh axes."""
