"""Retrieval: corpora, indices, searches, and what their results are written as."""
