"""What the model computes on the queries: which queries are used, and the statistics that are kept of them."""
