"""What moves an image within a ball until a model is wrong about it."""
