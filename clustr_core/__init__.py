"""The small, tested package under the book: clusters, certificates, the magnet loss and attacks."""

__version__ = "0.1.0"
