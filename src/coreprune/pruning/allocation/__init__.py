"""Choose how many units of every group stay under a budget."""
