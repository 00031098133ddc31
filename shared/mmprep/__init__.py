"""mmprep: multimodal preprocessing for inference engines."""
