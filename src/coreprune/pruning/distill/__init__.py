"""Train the pruned model towards the original's outputs on the queries."""
