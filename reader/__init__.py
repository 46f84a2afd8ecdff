"""What the scripts share about readers: opening, predictions, passages of a frozen retriever."""
