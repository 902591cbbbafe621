"""How wide every group stays under a budget."""
