"""Train the pruned model towards the original's answers on the queries."""
