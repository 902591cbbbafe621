"""One layer of a model as the theory describes it: its weights, its norms, its activation, its linear map."""
