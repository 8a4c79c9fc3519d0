"""The tiny world: real photographs, real handwritten digits, and small backbones that are trained here."""
