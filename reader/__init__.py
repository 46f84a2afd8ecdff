"""Readers: their interface, opening, predictions, and passages of a frozen retriever."""
