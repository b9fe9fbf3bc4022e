"""Folding recurrent layers: which executed layers use one layer's weights, and whether that pays."""
