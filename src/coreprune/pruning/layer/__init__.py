"""One layer of a model in the words of the theory: its weights, its surroundings, its activation, its linear map."""
