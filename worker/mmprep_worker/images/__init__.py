"""Pictures: opening and decoding, exact resampling, and the tables and layouts that turn pixels into tensors."""
