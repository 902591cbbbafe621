"""Sources of queries: inputs that are made without data, one algorithm to a file."""
