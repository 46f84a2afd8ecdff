"""The pages of --html."""
