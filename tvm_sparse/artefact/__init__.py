"""The folder a build leaves: compiled library, packed weights, what is in them. The reader needs no torch."""
