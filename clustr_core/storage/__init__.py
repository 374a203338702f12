"""What is on disk: files written whole or not at all, tables, and where a number comes from."""
