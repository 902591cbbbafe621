"""Where models meet numerics: selectors, budgets, plans, and prune()."""
