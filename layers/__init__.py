"""T5's and causal models' layers over packed tokens, dropout, and GradCache."""
