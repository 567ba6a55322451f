"""Names the object stores that corpora are read from; plain data, so that settings can be made without more."""

SCHEMES = ("s3",)
"""Of addresses; others are of fsspec's as well, and not tried."""
