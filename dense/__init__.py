"""The retriever: models and their folders, losses, training examples, batches."""
