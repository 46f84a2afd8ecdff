"""Retrieval: indices, searches, measures, and the files that results are written to."""
