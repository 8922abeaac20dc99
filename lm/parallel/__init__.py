"""The ground every room stands on: the mesh, and the one table from logical to mesh axes."""

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: start the same command again, on every host
