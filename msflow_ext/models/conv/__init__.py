"""Convolutions by the fastest algorithm for their sizes, in training and for inference."""
