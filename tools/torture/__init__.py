"""What the book does with hostile files, with kills, signals and full disks: `python -m tools.torture`."""
