"""Read and write the scripts' files: records, questions, tables, corpora and journals."""
