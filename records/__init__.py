"""Files, questions, tables and corpora: what the scripts read and write."""
