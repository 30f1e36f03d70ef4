"""Convolutions in the form that is fastest for their sizes: trained, packed for inference, Winograd's."""
