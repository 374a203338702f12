"""What chapters 1 and 2 check: the proof, the examples, the exact distance, searches, pictures."""
