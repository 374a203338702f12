"""What turns sources into a book: run a chapter, publish its twin, check the whole. No mathematics here."""
